"""Compare a device's results with the CPU's, before anything is timed on it.

    python benchmarks/check_device.py --device cuda --preset reference --steps 100

Logits, gradients and a short loss curve: float32 on the device against the CPU, then bfloat16
against float32 on the device. Dropout and RandAugment are off, so that all runs are comparable. The
exit code is 1 if a difference exceeds its bound or the loss does not decrease.
"""

import dataclasses
import json
import sys
from itertools import islice

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vitrail.config.files import from_json
from vitrail.config.presets import get_preset
from vitrail.config.settings import Config
from vitrail.data.batches import Batches
from vitrail.data.datasets import load_data
from vitrail.data.images import ImageSet
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng
from vitrail.training.loop import train
from vitrail.training.state import TrainingState

BOUNDS = {
    ("float32", "logits"): 1e-4,
    ("float32", "gradients"): 1e-3,
    ("float32", "loss curve"): 0.05,
    ("bfloat16", "logits"): 0.05,
    ("bfloat16", "gradients"): 0.1,
    ("bfloat16", "loss curve"): 0.05,
}
"""Largest difference: for logits and gradients relative to their norm; for the curve in nats."""


def outcomes(
    config: Config, images: ImageSet, device: torch.device, steps: int
) -> dict[str, Tensor]:
    """Return the logits and gradients of a first batch, and the loss of every update."""
    with rng.seeded(config.run.seed, "init", device=torch.device("cpu")):
        model = VisionTransformer(config.model).to(device)
    batches = Batches(images, config, device=device)
    first = batches(0)
    half = config.training.precision == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        logits_BY = model(first.images_BCHW)
    F.cross_entropy(logits_BY.float(), first.targets_BY).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    found = {"logits": logits_BY, "gradients": torch.cat(gradients)}
    state = TrainingState.start(model, config.training)
    losses = [float(update.loss) for update in islice(train(state, batches, config), steps)]
    found["loss curve"] = torch.tensor(losses)
    return {name: values.detach().double().cpu() for name, values in found.items()}


def difference(name: str, got: Tensor, expected: Tensor) -> float:
    """Return the difference of two outcomes."""
    if name == "loss curve":
        return (got - expected).abs().mean().item()
    return ((got - expected).norm() / expected.norm()).item()


def main(
    device: str = "cuda",
    preset: str = "reference",
    steps: int = 100,
    batch_size: int = 128,
    embed_dim: int | None = None,
    n_layers: int | None = None,
) -> int:
    """Compare a device with the CPU.

    Args:
        device: the device to check.
        preset: preset to train on the synthetic shapes.
        steps: updates of the loss curve.
        batch_size: images in one update.
        embed_dim: overrides the preset's width.
        n_layers: overrides the preset's depth.
    """
    base = get_preset(preset)
    model = {"dropout": 0.0, "drop_path": 0.0}
    model |= {} if embed_dim is None else {"embed_dim": embed_dim}
    model |= {} if n_layers is None else {"n_layers": n_layers}
    changes = {
        "model": model,
        "data": {"dataset": "shapes"},
        "augment": {"randaugment_ops": 0},
        "training": {"batch_size": batch_size, "learning_rate": 1e-3, "warmup_epochs": 0},
    }
    config = from_json(changes, base)
    images = load_data(config.data, ["train"], image_hw=config.model.image_hw).images["train"]
    sized = dataclasses.replace(config.model, n_classes=len(images.classes))
    config = dataclasses.replace(config, model=sized)

    def run(where: str, precision: str) -> dict[str, Tensor]:
        chosen = from_json({"training": {"precision": precision}}, config)
        return outcomes(chosen, images, torch.device(where), steps)

    here, there, half = run("cpu", "float32"), run(device, "float32"), run(device, "bfloat16")
    pairs = {"float32": (there, here), "bfloat16": (half, there)}
    rows = []
    for (precision, name), bound in BOUNDS.items():
        got, expected = pairs[precision]
        apart = difference(name, got[name], expected[name])
        rows.append((f"{precision}, {name}", apart, bound, apart <= bound))
    tenth = max(1, steps // 10)
    for precision, (got, _) in pairs.items():
        losses = got["loss curve"]
        change = (losses[-tenth:].mean() - losses[:tenth].mean()).item()
        rows.append((f"{precision}, fall of the loss", change, 0.0, change < 0))
    show(rows, f"{preset} on {device}, {steps} updates")
    curves = {name: values[0]["loss curve"].tolist() for name, values in pairs.items()}
    print(json.dumps({"title": "check_device", "device": device, "rows": rows, "curves": curves}))
    return 0 if all(within for *_, within in rows) else 1


def show(rows: list[tuple[str, float, float, bool]], title: str) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left")
    for column in ("", "difference", "bound", ""):
        table.add_column(column)
    for name, apart, bound, within in rows:
        table.add_row(name, f"{apart:.2e}", f"{bound:g}", "ok" if within else "TOO FAR")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
