"""Groups of flags that several commands share: the model, its data, its pictures."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from vitrail.cli.console import print_err, waiting
from vitrail.config.settings import Dataset, Preparation
from vitrail.errors import ConfigError, PictureError
from vitrail.weights import bundled

if TYPE_CHECKING:
    import numpy as np

    from vitrail.data.images import ImageSet
    from vitrail.inference.classifier import Classifier

STDIN = "-"
MODEL_ENDINGS = (
    ".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".npz", ".onnx", ".pt2",
)  # fmt: skip
MODEL_FILES = ("checkpoint.json", "model.safetensors", "pytorch_model.bin")
"""A folder that holds one of these is a checkpoint, or weights of another library."""
FEWEST_IMAGES = 10
"""Minimum images for a confidence interval; the same as ``explain.map_metrics.FEWEST_IMAGES``."""


# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """The model, its device, and how its pictures are prepared."""

    model_path: str | None = None
    """Run folder, weights, bundled name or hf:OWNER/NAME. Default: the newest run (for picture
    files, if it was trained on photographs), else the bundled model. Prefix a path that could
    be a name with ./"""
    n_attention_heads: int | None = None
    """Number of attention heads, for weights whose files do not record it."""
    image_size: int | tuple[int, int] | None = None
    """Another image size for the model: learned positions are resized. Default: its own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto tries cuda, then mps, then cpu."""
    preparation: Preparation = field(default_factory=Preparation)


@dataclass(frozen=True)
class ModelArgument(ModelOptions):
    """The same for commands whose only positional argument is the model."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """Same as --model_path."""


def load_model(
    options: ModelOptions,
    runs: Path = Path("output"),
    *,
    files: bool = False,
    needs_classes: bool = True,
    default: str = bundled.DEFAULT,
) -> "Classifier":
    """Load the named model, or else the newest run or the bundled ``default``, and print which.

    For the user's picture ``files``, the default is used if the newest run was only trained on the
    built-in shapes.

    Raises:
        ConfigError: two models are named, or an ONNX file, which only ``vitrail predict`` runs, or
            the model has no classes, but the command needs them.
    """
    path = options.model_path
    if isinstance(options, ModelArgument) and options.model is not None:
        if path not in (None, options.model):
            raise ConfigError(
                f"two models are named, {options.model} and --model_path {path}: give one"
            )
        path = options.model
    if is_onnx(path):
        raise ConfigError(
            f"{path}: an ONNX file works with vitrail predict only: give the run folder or "
            "weights that it was exported from"
        )
    with waiting("loading the model"):
        from vitrail.weights.pretrained import load

        source = _choose_model(runs, default, files=files) if path is None else path
        heads, device = options.n_attention_heads, options.device
        model = load(
            source,
            n_attention_heads=heads,
            image_size=options.image_size,
            device=device,
            **options.preparation,
        )
    if needs_classes:
        model.require_classes()
    for note in model.notes:
        print_err(f"{source}: {note}")
    return model


def _choose_model(runs: Path, default: str, *, files: bool) -> Path | str:
    """Return the newest run or the default model, and print which it is and why."""
    from vitrail.weights.pretrained import knows_photographs, newest_run

    newest = newest_run(runs)
    if newest is None:
        print_err(f"no --model_path given: using the bundled model, {default}")
        return default
    if files and not knows_photographs(newest):
        print_err(
            f"no --model_path given: using the bundled model, {default}, since the newest run only "
            f"knows shapes (--model_path {newest} uses it)"
        )
        return default
    print_err(f"no --model_path given: using the newest run, {newest}")
    return newest


def is_onnx(path: str | None) -> bool:
    """Return whether a model is an ONNX file, which runs without torch."""
    return path is not None and path.lower().endswith(".onnx")


def is_model(arg: str) -> bool:
    """Return whether an argument can only mean a model."""
    path = Path(arg)
    try:
        if path.is_dir():
            return _is_run(path) or any((path / name).exists() for name in MODEL_FILES)
        is_file = path.name.lower().endswith(MODEL_ENDINGS) and path.is_file()
    except OSError:  # too long for a name
        return False
    return is_file or arg in bundled.names() or arg.startswith("hf:")


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder, not just one with an entry called checkpoints."""
    return (folder / "checkpoints").is_dir() and (folder / "config.json").is_file()


def name_of(source: str) -> str:
    """Return a model's name for files: that of its folder, bundled model, hub id or file stem."""
    if source.startswith("hf:"):
        return source.removeprefix("hf:").partition("@")[0].rpartition("/")[2]
    path = Path(source)
    endings = (end for end in MODEL_ENDINGS if path.name.lower().endswith(end))
    return path.name[: -len(next(endings))] if path.is_file() else path.resolve().name


# --- the data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions:
    """The dataset that images come from, if they are not picture files."""

    dataset: Dataset | None = None
    """Dataset. Default: the one that the model was trained on."""
    data_path: Path | None = None
    """Folder or file of the data. Default: the one used in training."""
    split: Literal["validation", "test", "train"] = "validation"
    """Split of the dataset."""

    def changes(self) -> dict[str, Any]:
        """Return the settings of the data that were given, by the names of DataConfig's fields."""
        given = {"dataset": self.dataset, "data_path": self.data_path}
        return {name: value for name, value in given.items() if value is not None}

    def to_load(self) -> dict[str, Any]:
        """Return the arguments of ``load_split``: all test images, also if training used fewer."""
        return {"split": self.split, "num_test_images": None, **self.changes()}


def check_images(count: int) -> None:
    """Refuse too few images for statistics over images."""
    if count < FEWEST_IMAGES:
        raise ConfigError(f"--images is {count}: give at least {FEWEST_IMAGES}")


def load_labeled(classifier: "Classifier", data: "DataOptions", **changes: Any) -> "ImageSet":
    """Load the split of images whose labels are the model's classes.

    Raises:
        ConfigError: it has other classes.
    """
    from vitrail.training.run_folder import load_split

    images = load_split(classifier, **data.to_load() | changes)
    if len(images) and images.classes != classifier.classes:
        raise ConfigError(
            f"{data.dataset or classifier.config.data.dataset} has the classes "
            f"{', '.join(images.classes[:4])}…, the model {', '.join(classifier.classes[:4])}…: "
            "give data with the model's classes"
        )
    return images


def log_test_use(
    classifier: "Classifier", split: str, folder: Path, purpose: str, images: int
) -> None:
    """Log a use of the test split in the model's run folder, or else in the folder given."""
    from vitrail.training.run_folder import log_test_use_of

    if split == "test":
        note = log_test_use_of(classifier.source, folder, purpose, images)
        if note:
            print_err(note)


def load_image(
    classifier: "Classifier", data: DataOptions, index: int, *, folder: Path, purpose: str
) -> "tuple[np.ndarray, str]":
    """Return one image of a split as an array (H, W, 3), and its label; log a test use.

    Raises:
        ConfigError: the split has no such image.
    """
    from vitrail.training.run_folder import load_split

    images = load_split(classifier, **data.to_load())
    if not 0 <= index < len(images):
        raise ConfigError(f"--index is {index}: give 0 to {len(images) - 1} ({data.split} images)")
    log_test_use(classifier, data.split, folder, purpose, 1)
    raw_HWC = images.raw_BCHW[index].expand(3, -1, -1).permute(1, 2, 0).numpy()
    return raw_HWC, images.classes[int(images.labels_B[index])]


# --- pictures -------------------------------------------------------------------------------------

Pictures = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL] [PICTURE ...]")
]
"""The type of the positional arguments that name pictures."""


@dataclass(frozen=True)
class PictureOptions(ModelOptions):
    """The same for commands whose positional arguments are pictures, perhaps after the model."""

    pictures: Pictures = ()
    """Files, folders, globs, or - for a picture on standard input. The first may be the model."""


Options = TypeVar("Options", bound=PictureOptions)


def take_model(options: Options) -> Options:
    """Return the options with a model named before the pictures moved to ``model_path``.

    Raises:
        ConfigError: --model_path names a model, too.
    """
    if not options.pictures or not is_model(options.pictures[0]):
        return options
    first, *rest = options.pictures
    if options.model_path not in (None, first):
        raise ConfigError(
            f"two models are named, {first} and --model_path {options.model_path}: give one"
        )
    return dataclasses.replace(options, model_path=first, pictures=tuple(rest))


def list_pictures(args: Sequence[str]) -> list[str]:
    """Return the names of all pictures that the arguments match; ``-`` is standard input.

    Raises:
        ConfigError: an argument is a model.
        PictureError: an argument matches no picture.
    """
    for arg in args:
        if not arg:
            raise PictureError("'' is an empty name: give a picture, a folder or a glob")
        if is_model(arg):
            raise ConfigError(f"{arg} is a model, not a picture: name it first")
    return [name for arg in args for name in ([arg] if arg == STDIN else _search(arg))]


def _search(arg: str) -> list[str]:
    """Return the pictures that one argument matches, without the plots in run folders."""
    from vitrail.data.formats import find_pictures  # here, since --help need not load Pillow

    found = find_pictures([arg])
    pictures = [str(path) for path in found if not _is_in_run(path, Path(arg))]
    if not pictures:
        raise PictureError(f"{arg}: its only pictures are the plots of runs")
    if len(pictures) < len(found):
        print_err(f"{arg}: skipped {len(found) - len(pictures)} plots of runs")
    return pictures


def _is_in_run(path: Path, root: Path) -> bool:
    """Return whether a picture is in a run folder below the folder that is searched."""
    inside = (folder for folder in path.parents if root in folder.parents)
    return any(map(_is_run, inside))
