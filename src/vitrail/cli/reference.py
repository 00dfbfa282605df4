"""The two commands of the reference implementation, with its flags.

``python train.py`` and ``python test.py`` at the root of the repository call the functions here.
The reference implementation is https://github.com/nick8592/ViT-Classification-CIFAR10.
"""

import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from vitrail.cli import guarded, process, train
from vitrail.cli.console import out, print_err, print_out
from vitrail.cli.options import DataOptions, ModelOptions, load_image, load_model
from vitrail.cli.parsing import parse
from vitrail.cli.test import TestOptions, score, show
from vitrail.config.settings import require_range
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier
    from vitrail.inference.predictions import Prediction

ARCHITECTURE = (
    "image_size",
    "n_channels",
    "patch_size",
    "n_classes",
    "embed_dim",
    "n_layers",
    "n_attention_heads",
    "forward_mul",
    "dropout",
)


def train_command() -> int:
    """Run ``python train.py``: the preset ``reference``, with its flags and all of ours."""
    return guarded(run_train, sys.argv[1:])


def run_train(args: Sequence[str]) -> int:
    """Translate the flags that have another name in Vitrail, and train."""
    process.limit_spinning()
    args = [_spell_out(arg) for arg in args]
    args, stamp = _take_value(args, "--timestamp", time.strftime("%Y-%m-%d-%H-%M"))
    if not any(_named(arg, "--resume") for arg in args):
        chosen = {"--preset": "reference", "--model_path": "model"}
        for flag, value in chosen.items():
            if not any(_named(arg, flag) for arg in args):
                args = [*args, flag, value]
    return train.command(args, prog="python train.py", name=stamp)


def _spell_out(arg: str) -> str:
    """Return ``-lr`` as ``--learning_rate``."""
    return "--learning_rate" + arg.removeprefix("-lr") if _named(arg, "-lr") else arg


def _named(arg: str, flag: str) -> bool:
    """Return whether an argument is this flag, in either spelling, with or without a value."""
    return arg.partition("=")[0].replace("-", "_") == flag.replace("-", "_")


def _take_value(args: Sequence[str], flag: str, default: str) -> tuple[list[str], str]:
    """Remove a flag with its value; return the other arguments, and the value."""
    left, value, args = [], default, list(args)
    while args:
        arg = args.pop(0)
        if not _named(arg, flag):
            left.append(arg)
        elif "=" in arg:
            value = arg.partition("=")[2]
        elif args:
            value = args.pop(0)
        else:
            raise ConfigError(f"{flag} requires a value")
    return left, value


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ReferenceTestOptions:
    """Test a model as the reference implementation does.

    The architecture is read from the file; the flags that describe it are only checked.
    """

    mode: Literal["cifar", "cifar-single", "custom"] = "cifar"
    """The test set, one of its images, or your own picture."""
    model_path: str | None = None
    """Run folder, .safetensors, or .pt of the reference implementation. Default: the newest run,
    else the bundled model."""
    index: int = 1
    """With cifar-single: index of the test image, from 0."""
    image_path: Path | None = None
    """With custom: the picture."""
    no_image: bool = False
    """Open no picture on the screen."""
    batch_size: int = 128
    """Images per batch."""
    num_workers: int = 2
    """Threads that decode picture files; 0 and 1 decode one at a time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto tries cuda, then mps, then cpu."""
    data_path: Path = Path("data")
    """Folder of the data."""
    num_test_images: int | None = None
    """Use only the first N test images. Default: all of them."""
    output_path: Path = Path("output")
    """Folder of the run folders and of this test's folder."""
    timestamp: str | None = None
    """Name of this test's folder. Default: the time."""
    image_size: int | None = None
    """Checked: side of the image in pixels."""
    n_channels: int | None = None
    """Checked: number of channels."""
    patch_size: int | None = None
    """Checked: side of a patch in pixels."""
    n_classes: int | None = None
    """Checked: number of classes."""
    embed_dim: int | None = None
    """Checked: width of a token."""
    n_layers: int | None = None
    """Checked: number of blocks."""
    n_attention_heads: int | None = None
    """Number of heads, which a .pt of the reference implementation does not contain. Default: 4 for
    these; for all others, checked."""
    forward_mul: float | None = None
    """Checked: hidden width of the MLP, as a multiple of embed_dim."""
    dropout: float | None = None
    """Dropout in training; checked only if the file contains it, since testing has none."""

    def __post_init__(self) -> None:
        require_range(self, "batch_size num_test_images", 1)
        require_range(self, "num_workers index", 0)


def test_command() -> int:
    """Run ``python test.py``."""
    return guarded(run_test, sys.argv[1:])


def run_test(args: Sequence[str]) -> int:
    """Load the model, check the flags against it, and run the mode."""
    process.limit_spinning()
    options = parse(ReferenceTestOptions, args, prog="python test.py")
    if options.mode == "custom" and options.image_path is None:
        raise ConfigError("--mode custom requires --image_path FILE")
    heads = options.n_attention_heads
    models = ModelOptions(options.model_path, n_attention_heads=heads, device=options.device)
    classifier = load_model(models, options.output_path)
    _check_architecture(classifier, options)
    folder = options.output_path / (options.timestamp or time.strftime("%Y-%m-%d-%H-%M-%S"))
    if options.mode == "cifar":
        return _test_all(classifier, options, folder)
    if options.mode == "cifar-single":
        _test_single(classifier, options, folder)
    else:
        _test_custom(classifier, options)
    return 0


def _check_architecture(classifier: "Classifier", options: ReferenceTestOptions) -> None:
    """Refuse flags that contradict the model file."""
    for name in ARCHITECTURE:
        asked, actual = getattr(options, name), getattr(classifier.config.model, name)
        known = not (name == "dropout" and _is_reference_file(classifier))
        if asked is not None and known and asked != actual:
            raise ConfigError(
                f"--{name} is {asked}, but {classifier.source} has {actual}: leave it out"
            )


def _is_reference_file(classifier: "Classifier") -> bool:
    """Return whether the model is from a file of the reference implementation."""
    return Path(classifier.source).suffix in (".pt", ".pth")


def _test_all(classifier: "Classifier", options: ReferenceTestOptions, folder: Path) -> int:
    """Run ``--mode cifar``: the whole test set; return the exit code."""
    given = ("num_test_images", "num_workers", "batch_size")
    chosen = {name: getattr(options, name) for name in given}
    data = DataOptions(data_path=options.data_path, split="test")
    scored = score(classifier, TestOptions(output_path=folder, data=data, **chosen))
    metrics = scored.metrics
    show(metrics)
    out.print(f"Test acc: {metrics.accuracy:.2%}\tTest loss: {metrics.loss:.4f}")
    print_err(f"plots and metrics.json in {folder}/")
    if scored.problems:
        return scored.report_problems()
    _show_picture(folder / "confusion_matrix.png", options)
    return 0


def _test_single(classifier: "Classifier", options: ReferenceTestOptions, folder: Path) -> None:
    """Run ``--mode cifar-single``: print the label and the prediction for one test image."""
    from PIL import Image

    from vitrail.runtime.files import replace_file
    from vitrail.weights.pretrained import of_model_size

    index, data = options.index, DataOptions(data_path=options.data_path, split="test")
    picture_HWC, label = load_image(
        classifier, data, index, folder=folder, purpose=f"image {index} classified"
    )
    (top,) = of_model_size(classifier).predict([picture_HWC])
    verdict = "<Correct>" if top[0].name == label else "<Wrong>"
    _say_result(f"{verdict} {label}(label)\t", top)
    path = folder / f"test-{index}.png"
    enlarged = Image.fromarray(picture_HWC).resize((384, 384), Image.Resampling.NEAREST)
    png = io.BytesIO()
    enlarged.save(png, format="PNG")
    replace_file(path, png.getvalue())
    _show_picture(path, options)


def _test_custom(classifier: "Classifier", options: ReferenceTestOptions) -> None:
    """Run ``--mode custom``: print the prediction for a picture of the user."""
    assert options.image_path is not None
    (top,) = classifier.predict([options.image_path])
    _say_result("Output: ", top)
    _show_picture(options.image_path, options)


def _say_result(start: str, top: "list[Prediction]") -> None:
    """Print the class with its probability, and the runners-up."""
    from vitrail.errors import printable

    best, *others = (f"{printable(p.name)} {p.probability:.1%}" for p in top)
    line = f"{printable(start.rstrip())}{start[len(start.rstrip()) :]}{best}(output)\tthen "
    print_out(line + ", ".join(others))


def _show_picture(path: Path, options: ReferenceTestOptions) -> None:
    """Open a picture in the system's viewer, if there is a screen, without waiting for it."""
    if options.no_image:
        return
    from PIL import Image, ImageShow

    screen = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    with Image.open(path) as image:
        if not (screen and ImageShow.show(image, title=path.name)):
            print_err(f"no screen to show the picture on; it is in {path}")
