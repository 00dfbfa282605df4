"""What a run leaves at its end: a summary, pictures, weights in a file."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.inference.classifier import Classifier
from vitrail.weights.checkpoint import CheckpointInfo, save_weights_file


def summarise(
    best: Classifier, rows: Sequence[dict[str, Any]], *, train_images: int, seconds: float
) -> dict[str, Any]:
    """Return what result.json says besides the test scores."""
    step = int(Path(best.source).name.removeprefix("step-"))
    row = next((row for row in rows if row["step"] == step), {})
    validation = {
        name: row[f"validation_{name}"]
        for name in ("accuracy", "loss")
        if f"validation_{name}" in row
    }
    epochs = rows[-1]["epoch"]
    return {
        "epochs": epochs,
        "best_epoch": row.get("epoch"),
        "validation": validation or None,
        "parameters": sum(parameter.numel() for parameter in best.model.parameters()),
        "train_images": train_images,
        "seconds": round(seconds, 1),
        "evaluation_seconds": round(sum(row.get("evaluation_seconds", 0) for row in rows), 1),
        "images_per_second": speed(train_images * epochs, seconds),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def speed(images: int, seconds: float) -> float:
    """Return images per second, also where a clock stood still."""
    return round(images / max(seconds, 1e-9), 1)


def write_weights(best: Classifier, info: CheckpointInfo, run_name: str) -> None:
    """Write the weights of the best checkpoint where the reference system's flags want them.

    ``info`` is that checkpoint's. The file is named by its epoch, counted from 0 as there.
    """
    run, model = info.config.run, info.config.model
    size = "x".join(map(str, dict.fromkeys(model.image_hw)))
    name = run.model_name or f"vit-layer{model.n_layers}-{size}-{info.config.data.dataset}"
    file = f"{name}-{info.metrics['epoch'] - 1:03}.safetensors"
    path = Path(run.model_path or "model") / run_name / file
    save_weights_file(path, info, best.model.state_dict())
