"""A name, file, folder or hub id -> a model ready to use."""

import dataclasses
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from vitrail.config.files import replace_fields
from vitrail.config.settings import (
    PREPARATION,
    Config,
    DataConfig,
    ModelConfig,
    Preparation,
    RunConfig,
    TrainingConfig,
)
from vitrail.data.hf import PREFIX, is_on_hub
from vitrail.errors import CheckpointError, ConfigError
from vitrail.explain.stored_scores import read_verdict
from vitrail.inference.classifier import Classifier
from vitrail.model.finetune import adapt, build_model, resize
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng
from vitrail.runtime.hardware import choose_device
from vitrail.weights import bundled, hub
from vitrail.weights.checkpoint import (
    INFO,
    MODEL,
    TRAINING,
    CheckpointInfo,
    describes_itself,
    load_info,
    load_weights,
    load_weights_file,
    read_json_object,
    read_pointer,
    save_weights_file,
)
from vitrail.weights.formats import Converted
from vitrail.weights.formats.convert import (
    CONFIG,
    FILES,
    read_foreign,
    write_foreign,
)

OWN = "vitrail"
"""Name of our own layout."""
FINE_TUNING_RATE = 0.01
"""Muon's learning rate for pretrained weights; a preset's, for random ones, would undo them."""


@dataclass(frozen=True)
class Source:
    """Weights and their description. n_classes is 0 if they have no head."""

    info: CheckpointInfo
    weights: dict[str, Tensor]
    layout: str = OWN
    notes: tuple[str, ...] = ()
    """What was assumed, changed or ignored to read another library's weights."""
    tensors: int = 0
    """Number of the other library's tensors that were read."""
    classes_known: bool = True
    """Whether the files contain the class names; otherwise they are numbered."""


def load(
    source: str | Path | None = None,
    *,
    n_attention_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    device: str = "auto",
    **preparation: Unpack[Preparation],
) -> Classifier:
    """Load a classifier, or a network without classes, from a file, folder, bundled name or hub id.

    Args:
        source: the name of a bundled model (``"cifar10"``; ``"./cifar10"`` and every ``Path`` are
            paths); a run folder (its BEST checkpoint), a checkpoint folder, a ``.safetensors`` file
            of Vitrail; weights of the reference implementation (``.pt``), timm (``.safetensors``,
            ``.pth``, or a folder), Hugging Face (a folder of ViT, DeiT, DINOv2, DINOv3, CLIP or
            SigLIP), Google (``.npz``); or a hub id, ``hf:OWNER/NAME``. Default: the newest run in
            output/, else the bundled model.
        n_attention_heads: the head count, if the files do not contain it. Default: 4 for the
            reference's ``.pt``, the usual one for their width for timm's files.
        image_size: another size of the pictures, side or height and width in pixels: learned
            positions are resized.
        device: auto, cpu, cuda or mps.
        preparation: how pictures are prepared: ``mean``, ``std``, ``fit``, ``interpolation``,
            ``crop_pct``, ``pixel_range``, as in ``DataConfig``. Default: as the
            weights specify; the classifier's ``notes`` list what was assumed.

    Raises:
        CheckpointError: nothing to load, or corrupt, or unsupported.
        ConfigError: the device is not available, or a setting is invalid.
    """
    if unknown := set(preparation) - set(PREPARATION):
        raise TypeError(f"load() has no argument {unknown.pop()!r}")
    given = {name: value for name, value in preparation.items() if value is not None}
    chosen = choose_device(device)
    source = (newest_run(Path("output")) or bundled.DEFAULT) if source is None else source
    found = read(
        source, n_attention_heads=n_attention_heads, image_size=image_size, preparation=given
    )
    try:
        model = build_model(found.info.config.model, found.weights)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    stored = scores_path(source)
    return Classifier(
        model.eval().to(chosen), found.info.config, found.info.classes, str(source), found.notes,
        found.info.calibration,
        verdict=read_verdict(stored, model) if stored else None,
    )  # fmt: skip


def scores_path(source: str | Path) -> Path | None:
    """Return where the scores of a model's maps are stored: beside its weights; None on the hub."""
    if is_on_hub(source):
        return None
    named = isinstance(source, str) and source in bundled.names()
    path = bundled.weights_path(str(source)) if named else Path(source)
    return path / "scores.json" if path.is_dir() else path.with_suffix(".scores.json")


def read(
    source: str | Path,
    *,
    n_attention_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    preparation: Mapping[str, Any] | None = None,
) -> Source:
    """Return the weights that ``load`` would load, and their description.

    ``preparation`` has fields of PREPARATION that override those in the files.
    """
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise CheckpointError(f"a model is a name or path, not a {kind}: for example cifar10")
    path, given = Path(source), preparation or {}
    if is_on_hub(source):
        path = hub.download(str(source))
    elif isinstance(source, str) and source in bundled.names():
        path = bundled.weights_path(source)
    if not path.exists():
        raise CheckpointError(
            f"{source}: no such model; give a run or checkpoint folder, a file or folder of "
            f"weights (vitrail convert --help lists the formats), or {PREFIX}OWNER/NAME"
        )
    if path.is_file() and not path.name.endswith(FILES):
        raise CheckpointError(f"{path}: not a model file: give {', '.join(FILES)}")
    own = _read_own(path)
    if own is None:
        found, other = _read_other(path, str(source), n_attention_heads, given)
        return _resize(found, image_size or other.image_hw, antialias=other.antialias)
    heads = own.info.config.model.n_attention_heads
    if n_attention_heads not in (None, heads):
        raise CheckpointError(f"{source} has {heads} attention heads, not {n_attention_heads}")
    data = replace_fields(own.info.config.data, given)
    config = dataclasses.replace(own.info.config, data=data)
    own = dataclasses.replace(own, info=dataclasses.replace(own.info, config=config))
    return _resize(own, image_size)


def _resize(
    source: Source, image_size: int | tuple[int, int] | None, *, antialias: bool = False
) -> Source:
    """Return the weights for another image size. Learned positions are resized, once."""
    model = source.info.config.model
    if image_size in (None, model.image_size, model.image_hw):
        return source
    resized = dataclasses.replace(model, image_size=image_size)
    weights, notes = resize(source.weights, model, resized, antialias=antialias)
    config = dataclasses.replace(source.info.config, model=resized)
    return dataclasses.replace(
        source,
        info=dataclasses.replace(source.info, config=config),
        weights=weights,
        notes=(*source.notes, *notes),
    )


def _read_own(path: Path) -> Source | None:
    """Read our own file, run or checkpoint folder, or hub folder; None for another library's."""
    if path.is_dir():
        run = (path / "checkpoints").is_dir()
        folder = read_pointer(path / "checkpoints", "BEST") if run else path
        if run or (folder / INFO).exists() or (folder / TRAINING).exists():
            return Source(load_info(folder), load_weights(folder))
        if not describes_itself(folder / MODEL):
            return None
        source = Source(*load_weights_file(folder / MODEL))
        if (folder / CONFIG).exists():  # as on the hub, for humans to read
            described = CheckpointInfo.from_json(read_json_object(folder / CONFIG), folder / CONFIG)
            if (described.config, described.classes) != (source.info.config, source.info.classes):
                raise CheckpointError(f"{folder}: {CONFIG} and {MODEL} describe different models")
        return source
    return Source(*load_weights_file(path)) if describes_itself(path) else None


def _read_other(
    path: Path, source: str, n_attention_heads: int | None, given: Mapping[str, Any]
) -> tuple[Source, Converted]:
    """Read and convert another library's weights, which the user calls ``source``."""
    found = read_foreign(path, n_attention_heads)
    for name, what in found.refused.items():
        if name not in given:
            flags = " ".join(f"--{each} VALUE" for each in found.refused)
            raise CheckpointError(
                f"{source}: its pictures are prepared by {what}, which Vitrail does not support: "
                "choose the nearest option with "
                f"vitrail convert {shlex.quote(source)} FILE.safetensors {flags}"
            )
    dataset = "cifar10" if found.layout == "reference" else "folder"
    data = replace_fields(DataConfig(), {"dataset": dataset, **found.data, **given})
    classes = found.classes or tuple(f"class {i}" for i in range(found.config.n_classes))
    info = CheckpointInfo(Config(model=found.config, data=data), classes, {}, {})
    notes = (*found.notes, *_note_assumed(found, given))
    known = bool(found.classes)
    converted = Source(info, dict(found.weights), found.layout, notes, found.tensors, known)
    return converted, found


def _note_assumed(found: Converted, given: Mapping[str, Any]) -> list[str]:
    """Return a note on how pictures are prepared if neither the files nor the user specify it."""
    names = [name for name in found.assumed if name not in given]
    values = []
    for name in names:
        value = found.data[name]
        words = [v if isinstance(v, str) else f"{v:g}" for v in np.atleast_1d(value).tolist()]
        values.append(" ".join([name, *words]))
    flags = ", ".join(f"--{name}" for name in names)
    return [f"assumed, not in the files: {', '.join(values)} (set by {flags})"] if names else []


def with_init(config: Config, init: str, n_attention_heads: int | None = None) -> Config:
    """Return the settings of a run that starts from weights: their model and preparation.

    Dropout and stochastic depth are kept; the number of classes is that of the data. Muon's
    rate is at most FINE_TUNING_RATE.
    """
    theirs = read(init, n_attention_heads=n_attention_heads).info.config
    # The range of 16-bit pictures is a property of the data, not of the weights.
    names = (name for name in PREPARATION if name != "pixel_range")
    preparation = {name: getattr(theirs.data, name) for name in names}
    free = {name: getattr(config.model, name) for name in ("dropout", "drop_path")}
    rate = min(config.training.muon_learning_rate, FINE_TUNING_RATE)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(theirs.model, n_classes=0, **free),
        data=replace_fields(config.data, preparation),
        training=dataclasses.replace(config.training, init=init, muon_learning_rate=rate),
    )


def start_from(
    model: VisionTransformer, training: TrainingConfig, classes: tuple[str, ...]
) -> list[str]:
    """Load ``training.init`` into the model of a new run, and return notes of what was changed.

    Raises:
        CheckpointError: the weights have another architecture, or a head for other classes.
    """
    # The head count was set from these weights, so files without one cannot contradict it.
    # Read at the model's size, so that learned positions are resized once, as their layout does.
    found = read(
        training.init,
        n_attention_heads=model.config.n_attention_heads,
        image_size=model.config.image_hw,
    )
    names = found.info.classes
    if not training.new_head and found.classes_known and names != classes:
        raise CheckpointError(
            f"{training.init}: its head is for {', '.join(names[:3])}…, the dataset has "
            f"{', '.join(classes[:3])}…: give --new_head"
        )
    try:
        notes = adapt(model, found.info.config.model, found.weights, new_head=training.new_head)
    except CheckpointError as error:
        raise CheckpointError(f"{training.init}: {error}") from error
    return [f"{training.init}: {note}" for note in (*found.notes, *notes)]


def remodel(source: Source, model: ModelConfig, *, new_head: bool = False) -> Source:
    """Adapt weights to another image size or, with ``new_head``, other classes."""
    with rng.seeded(RunConfig.seed, "init", device=torch.device("cpu")):
        built = VisionTransformer(model)
    notes = adapt(built, source.info.config.model, source.weights, new_head=new_head)
    config = dataclasses.replace(source.info.config, model=model)
    same = model.n_classes == len(source.info.classes) and not new_head
    names = source.info.classes if same else tuple(f"class {i}" for i in range(model.n_classes))
    return dataclasses.replace(
        source,
        info=CheckpointInfo(config, names, source.info.numbers, source.info.metrics),
        weights=dict(built.state_dict()),
        notes=(*source.notes, *notes),
    )


def save(source: Source, path: Path, layout: str = OWN) -> None:
    """Write weights as one ``.safetensors`` file of Vitrail, or in another library's layout."""
    if layout != OWN:
        write_foreign(path, layout, source.info, source.weights)
    elif path.suffix != ".safetensors":
        raise ConfigError(f"{path}: give a name that ends in .safetensors, or another --layout")
    else:
        save_weights_file(path, source.info, source.weights)


def newest_run(output_path: Path) -> Path | None:
    """Return the run folder with the newest best checkpoint, or None."""
    pointers = sorted(output_path.glob("*/checkpoints/BEST"), key=lambda path: path.stat().st_mtime)
    return pointers[-1].parent.parent if pointers else None


def knows_photographs(run: Path) -> bool:
    """Return whether a run was trained on photographs, which the built-in shapes are not."""
    try:
        data = read_json_object(run / "config.json").get("data")
    except CheckpointError:
        return True  # unknown: loading the run reports what is wrong
    return not isinstance(data, dict) or data.get("dataset") != "shapes"


def of_model_size(classifier: Classifier) -> Classifier:
    """Return the classifier for images that already have its input size, without cropping."""
    data = dataclasses.replace(classifier.config.data, fit="squash", crop_pct=1.0)
    config = dataclasses.replace(classifier.config, data=data)
    return dataclasses.replace(classifier, config=config)
