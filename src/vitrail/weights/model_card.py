"""A model -> the folder that goes on the hub: weights, settings, and a model card.

config.json         settings, classes, versions: the description in model.safetensors
model.safetensors   the weights, in a file that describes itself
README.md           the model card
"""

import dataclasses
from pathlib import Path
from typing import Any

from vitrail.config.settings import Config, RunConfig
from vitrail.errors import printable
from vitrail.runtime.files import replace_file, write_json
from vitrail.weights import hub
from vitrail.weights.checkpoint import MODEL, CheckpointInfo, save_weights_file
from vitrail.weights.formats.convert import CONFIG
from vitrail.weights.pretrained import Source

CARD = "README.md"
DATA = {
    "shapes": "drawn shapes, made by Vitrail itself from a seed",
    "cifar10": "CIFAR-10 (Krizhevsky 2009), 32 x 32 photos",
    "cifar100": "CIFAR-100 (Krizhevsky 2009), 32 x 32 photos",
    "folder": "pictures in folders, one folder a class",
}
ON_THE_HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
"""Data sets by their id on the hub."""

SHOWN = 20
"""Number of class names that the card lists."""
USE = """```
pip install -e ".[hub]"  # in a clone of Vitrail's repository
vitrail predict --model_path HUB_ID PICTURE
vitrail explain --model_path HUB_ID PICTURE
```

```python
import vitrail

classifier = vitrail.load("HUB_ID")
classifier.predict("picture.png")
```"""
LIMITS = """\
- It knows its classes and nothing else: a picture of anything else gets one of them, perhaps with
  a high probability.
- It was made for pictures like those it was trained on, of that size. Larger ones are made smaller
  first, and detail is lost.
- It was not tested for fairness, nor against pictures made to deceive it. Let no decision about
  people rest on it."""


def write_hub_folder(
    folder: Path, source: Source, hub_id: str, *, license: str, result: dict[str, Any] | None
) -> None:
    """Write all that goes on the hub.

    Args:
        folder: where to.
        source: the model.
        hub_id: what it will be called.
        license: an identifier of the hub's, e.g. ``mit``.
        result: a finished run's result.json, where there is one.

    Raises:
        ConfigError: huggingface_hub is not installed.
        OutputError: a file cannot be written.
    """
    info = dataclasses.replace(source.info, config=without_paths(source.info.config))
    save_weights_file(folder / MODEL, info, source.weights)
    write_json(folder / CONFIG, {"model_type": "vitrail", **info.to_json()})
    name = hub_id.removeprefix(hub.PREFIX)
    text = front_matter(info, name, license, result) + body(info, name, license, result)
    replace_file(folder / CARD, text.encode())


def without_paths(config: Config) -> Config:
    """Return the settings without the places of this machine: they are nobody else's business."""
    run = RunConfig(seed=config.run.seed, monitor=config.run.monitor)
    data = dataclasses.replace(config.data, data_path=type(config.data)().data_path)
    init = config.training.init
    if init and not hub.is_hub_id(init):
        init = Path(init).name
    training = dataclasses.replace(config.training, init=init)
    return dataclasses.replace(config, run=run, data=data, training=training)


def front_matter(
    info: CheckpointInfo, name: str, license: str, result: dict[str, Any] | None
) -> str:
    """Return the card's machine-readable part."""
    hub.hub_api()  # reports what to install if it is missing
    from huggingface_hub import EvalResult, ModelCardData

    dataset = info.config.data.dataset
    known: dict[str, Any] = {"datasets": [ON_THE_HUB[dataset]]} if dataset in ON_THE_HUB else {}
    if result:
        figure = EvalResult(
            task_type="image-classification",
            dataset_type=ON_THE_HUB.get(dataset, dataset),
            dataset_name=dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_value=round(result["test"]["accuracy"], 4),
        )
        known |= {"model_name": name, "eval_results": [figure], "metrics": ["accuracy"]}
    data = ModelCardData(
        license=license,
        library_name="vitrail",
        pipeline_tag="image-classification",
        tags=["vision-transformer", "image-classification"],
        **known,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def body(info: CheckpointInfo, name: str, license: str, result: dict[str, Any] | None) -> str:
    """Return the card's part for people."""
    data, training = info.config.data, info.config.training
    start = f", starting from {training.init}" if training.init else ""
    trained = f"""Trained on {DATA[data.dataset]}{start}.
Pixels, scaled to [0, 1], are normalized with mean {list(data.mean)} and standard deviation
{list(data.std)}; pictures of another shape are fitted by "{data.fit}", resized by the filter
"{data.interpolation}", and {data.crop_pct:.4g} of each side is kept around the center."""
    sections = {
        "How to use": USE.replace("HUB_ID", hub.PREFIX + name),
        "Results": results(result),
        "Data": trained,
        "Recipe": recipe(info.config),
        "Limits": LIMITS,
        "License": f"{license}. The data set has its own terms.",
    }
    parts_of = [f"## {title}\n\n{text}" for title, text in sections.items()]
    parts = [f"# {name}", summary(info), *parts_of]
    return "\n" + "\n\n".join(parts) + "\n"


def summary(info: CheckpointInfo) -> str:
    """Return what the model is."""
    model, names = info.config.model, [printable(name) for name in info.classes]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    size = " x ".join(map(str, model.image_hw))
    return f"""A Vision Transformer for pictures of {size} pixels and {len(names)} classes:
{", ".join(names[:SHOWN])}{more}.
{model.n_layers} blocks of width {model.embed_dim} with {model.n_attention_heads} heads, patches of
{model.patch_size} x {model.patch_size} pixels. Made with Vitrail."""


def results(result: dict[str, Any] | None) -> str:
    """Return a table of a run's test figures and their spread."""
    if result is None:
        return "Not measured: these weights did not come from a finished training run."
    test = result["test"]
    low, high = test["accuracy_interval"]
    rows = [
        f"| accuracy | {test['accuracy']:.2%} | {low:.2%} to {high:.2%} |",
        f"| loss (nats) | {test['loss']:.4f} | |",
        f"| expected calibration error | {test['expected_calibration_error']:.4f} | |",
    ]
    return "\n".join(
        [
            f"On {test['images']:,} test images, without test-time augmentation:",
            "",
            "| | value | 95 % interval (Wilson) |",
            "|---|---|---|",
            *rows,
            "",
            "One run; the interval is that of the test images, not of other seeds. "
            f"{result['epochs']} epochs on {result['train_images']:,} images took "
            f"{result['seconds']:,.0f} s of training; {result['parameters']:,} parameters.",
        ]
    )


def recipe(config: Config) -> str:
    """Return a table of the settings of the model, the augmentation and the training."""
    rows = [
        f"| {field} | {str(value).replace('|', '/')} |"
        for section in (config.model, config.augment, config.training)
        for field, value in vars(section).items()
        if value not in ("", None)
    ]
    return "\n".join(["| setting | value |", "|---|---|", *rows, f"| seed | {config.run.seed} |"])
