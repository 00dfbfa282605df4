"""Arrays, a Dataset or a path -> a trained classifier, in one call."""

import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from vitrail.config.files import by_section, from_json
from vitrail.config.presets import get_preset
from vitrail.config.settings import Config
from vitrail.data.arrays import check_arrays
from vitrail.data.formats import is_wide_gray
from vitrail.data.pictures import as_array, read_picture
from vitrail.data.sources import is_gray, recognize
from vitrail.errors import ConfigError, DataError
from vitrail.inference.classifier import Classifier
from vitrail.training.run import EpochEnd, Run
from vitrail.training.run_folder import DATA, new_folder
from vitrail.weights import pretrained

Pairs: TypeAlias = tuple[Any, Any] | torch.utils.data.Dataset[Any]
"""Pictures and labels (arrays, tensors, lists), or a Dataset of (picture, label)."""
Data: TypeAlias = str | Path | Pairs
NAMES = {"train": "train", "validation": "val", "test": "test"}
"""Splits, and the prefixes of their arrays' names in the .npz file."""


def train(
    data: Data,
    preset: str = "quick",
    *,
    validation: Pairs | None = None,
    test: Pairs | None = None,
    classes: Sequence[str] | None = None,
    **settings: Any,
) -> Classifier:
    """Train a model and return it, with the scores of its run as ``result``.

    Args:
        data: ``(pictures, labels)`` as arrays or tensors, (N, H, W) or (N, H, W, C) or
            (N, C, H, W) of any numbers; a ``torch.utils.data.Dataset`` of (picture, label); or a
            path: a folder of class folders or of IDX files, an .npz, a Parquet file, hf:OWNER/NAME.
        preset: the name of a complete configuration.
        validation, test: like ``data``, but not a path. Default: a tenth of ``data`` for each,
            always the same images; if only ``validation`` is given, there is no test split.
        classes: names of the labels 0, 1, 2, ... Default: the Dataset's classes, or the labels.
        settings: any setting by name, as in ``vitrail train``. ``folder_name`` (or ``output_path``)
            keeps the run, with the arrays as data.npz, in ``output/``. Gray pictures train with
            n_channels 1 unless it is given.

    Raises:
        ConfigError: an unknown or invalid setting.
        DataError: the data are not labeled pictures.
        TrainingError: the loss is not finite.
    """
    given, asked = _read_settings(preset, settings, is_path=isinstance(data, str | Path))
    with tempfile.TemporaryDirectory(prefix="vitrail-") as temporary:
        keep = {"folder_name", "output_path"} & settings.keys()
        place = given.run.output_path if keep else Path(temporary)
        if isinstance(data, str | Path):
            if any(extra is not None for extra in (validation, test, classes)):
                raise ConfigError("a path has its own splits and classes: leave out validation, "
                                  "test and classes")  # fmt: skip
            dataset = asked.get("dataset") or recognize(Path(data))
            chosen = dataclasses.replace(given.data, dataset=dataset, data_path=Path(data))
            arrays = None
        else:
            arrays = _arrays({"train": data, "validation": validation, "test": test}, classes)
        folder = new_folder(place, given.run.folder_name, preset)
        if arrays is not None:
            np.savez(folder / DATA, allow_pickle=False, **arrays)
            chosen = dataclasses.replace(given.data, dataset="npz", data_path=folder / DATA)
        config = dataclasses.replace(given, data=chosen)
        if not given.training.init and "n_channels" not in asked and is_gray(chosen):
            config = from_json({"model": {"n_channels": 1}}, config)
        trained = _follow(config, folder)
        return trained if keep else dataclasses.replace(trained, source="")


def _read_settings(
    preset: str, settings: dict[str, Any], *, is_path: bool
) -> tuple[Config, dict[str, Any]]:
    """Return the complete settings, and those that were given, by name.

    As in ``vitrail train``, pretrained weights override the preset.
    """
    base, sections = get_preset(preset), by_section(settings, "train()")
    asked = {name: value for section in sections.values() for name, value in section.items()}
    if "data_path" in asked or ("dataset" in asked and not is_path):
        raise ConfigError("give the data as the first argument only: leave out data_path, and "
                          "dataset unless that is a path")  # fmt: skip
    if init := asked.get("init", base.training.init):
        base = pretrained.with_init(base, init, asked.get("n_attention_heads"))
    return from_json(sections, base), asked


def _follow(config: Config, folder: Path) -> Classifier:
    """Run a training to the end and return the best model."""
    console = Console(stderr=True)
    run = Run.start(config, folder)
    # In a notebook, rich's bar needs ipywidgets and warns without it; a plain line is enough.
    with Progress(
        console=console, disable=console.is_jupyter or not console.is_terminal
    ) as progress:
        task = progress.add_task("training", total=run.total_steps)
        for event in run.train():
            if isinstance(event, EpochEnd):
                score = event.row.get("validation_accuracy")
                shown = f"epoch {event.row['epoch']}/{config.training.epochs}"
                shown += "" if score is None else f", validation {score:.1%}"
                progress.update(task, description=shown)
                if console.is_jupyter:
                    print(f"\r{shown:<50}", end="", file=sys.stderr, flush=True)
            else:
                progress.advance(task)
        if console.is_jupyter:
            print(file=sys.stderr)
        result = run.finish()
    best = pretrained.load(folder, device=config.run.device)
    return dataclasses.replace(best, result=result)


def _arrays(parts: dict[str, Pairs | None], classes: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Return the arrays of the .npz file, by name."""
    arrays: dict[str, np.ndarray] = {}
    alone = parts["validation"] is None and parts["test"] is None
    for split, pairs in parts.items():
        if pairs is None:
            continue
        name = "the data" if split == "train" else split
        pictures, labels = _split_pairs(pairs, name)
        check_arrays(name, pictures.shape, labels, kind=pictures.dtype)
        prefix = "" if alone else f"{NAMES[split]}_"
        arrays |= {f"{prefix}images": pictures, f"{prefix}labels": labels}
    names = classes if classes is not None else getattr(parts["train"], "classes", None)
    return arrays if names is None else {**arrays, "classes": np.array(list(map(str, names)))}


def _split_pairs(pairs: Pairs, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures and the labels as two arrays."""
    if isinstance(pairs, tuple | list) and len(pairs) == 2:
        pictures, labels = pairs
    elif as_array(pairs, name) is None and _is_listed(pairs):
        items = [pairs[index] for index in range(len(pairs))]
        if not items or not all(
            isinstance(item, tuple | list) and len(item) == 2 for item in items
        ):
            raise DataError(f"{name}: the items of a Dataset must be pairs (picture, label)")
        pictures, labels = ([item[at] for item in items] for at in (0, 1))
    else:
        raise DataError(
            f"{name} is a {type(pairs).__name__}: give (pictures, labels), a Dataset with a "
            "length, or a path"
        )
    names = as_array(labels, name)
    names = np.asarray(list(map(_number, labels))) if names is None else names
    if names.dtype == object and all(isinstance(label, str) for label in names):
        names = names.astype(str)
    return _stack(pictures, name), names


def _is_listed(pairs: object) -> TypeGuard[Sequence[Any]]:
    """Return whether this has a length and can be indexed, like a Dataset."""
    return isinstance(pairs, Sized) and hasattr(pairs, "__getitem__")


def _number(label: Any) -> Any:
    """Return a label of a Dataset as a number or name."""
    return label.item() if isinstance(label, torch.Tensor | np.generic) else label


def _stack(pictures: Any, name: str) -> np.ndarray:
    """Return pictures as one array."""
    array = as_array(pictures, name)
    if array is not None:
        return array
    if not isinstance(pictures, Iterable) or isinstance(pictures, str):
        raise DataError(f"{name}: the pictures are a {type(pictures).__name__}: give an array")
    listed = [_pixels(picture, name) for picture in pictures]
    shapes = sorted({pixels.shape for pixels in listed})
    if len(shapes) != 1:
        raise DataError(f"{name}: pictures of {len(shapes)} shapes ({str(shapes[:3])[1:-1]}): give "
                        "pictures of one shape, or a folder of picture files")  # fmt: skip
    return np.stack(listed)


def _pixels(picture: Any, name: str) -> np.ndarray:
    """Return a picture as an array; a gray Pillow image stays gray."""
    if isinstance(picture, Image.Image):
        if is_wide_gray(picture):
            return np.asarray(picture)  # unchanged, as all pictures share one range
        rgb_HWC = read_picture(picture, name=name)
        return rgb_HWC[:, :, 0] if picture.mode in ("1", "L") else rgb_HWC
    array = as_array(picture, name)
    return read_picture(picture, name=name) if array is None else array
