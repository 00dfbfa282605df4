"""The two commands of the reference implementation, with its flags.

``python train.py`` and ``python test.py`` at the root of the repository call the functions here.
The reference implementation is https://github.com/nick8592/ViT-Classification-CIFAR10.
"""

import io
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from vitrail.cli import guarded, process, train
from vitrail.cli.console import out, print_err, print_out
from vitrail.cli.options import DataOptions, ModelOptions, load_image, load_model
from vitrail.cli.parsing import parse, parse_known
from vitrail.cli.test import TestOptions, score, show
from vitrail.config.settings import ModelConfig, require_range
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier
    from vitrail.inference.predictions import Ranking

PROG = "python test.py"


@dataclass(frozen=True)
class NameOption:
    """The flag of the reference's train.py that ``vitrail train`` lacks."""

    timestamp: str = ""
    """Default name of the run folder."""


def train_command() -> int:
    """Run ``python train.py``: the preset ``reference``, with its flags and all of ours."""
    return guarded(run_train, sys.argv[1:])


def run_train(args: Sequence[str]) -> int:
    """Translate the flags that have another name in Vitrail, and train."""
    process.limit_spinning()
    args = [re.sub(r"^-lr(?=$|=)", "--learning_rate", arg) for arg in args]
    named, args = parse_known(NameOption, args, prog="python train.py", add_help=False)
    if not any(arg.startswith("--resume") for arg in args):
        args = ["--preset", "reference", "--model_path", "model", *args]
    name = named.timestamp or time.strftime("%Y-%m-%d-%H-%M")
    return train.command(args, prog="python train.py", name=name)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ReferenceTestOptions:
    """Test a model as the reference implementation does.

    The architecture is read from the file. The flags that describe it (--patch_size, --embed_dim,
    --n_layers and so on, as in vitrail train) are only checked. A .pt of the reference
    implementation does not record --n_attention_heads; the default is 4.
    """

    mode: Literal["cifar", "cifar-single", "custom"] = "cifar"
    """The test set, one of its images, or your own picture."""
    model_path: str | None = None
    """Run folder, .safetensors, or .pt of the reference implementation. Default: the newest run,
    else the bundled ``reference``."""
    index: int = 1
    """With cifar-single: index of the test image, from 0."""
    image_path: Path | None = None
    """With custom: the picture."""
    no_image: bool = False
    """Do not open pictures on the screen."""
    batch_size: int = 128
    """Images per batch."""
    num_workers: int = 2
    """Threads that decode picture files; 0 and 1 decode one at a time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto tries cuda, then mps, then cpu."""
    data_path: Path = Path("data")
    """Folder of the data."""
    num_test_images: int | None = None
    """Use only N test images (stratified, always the same ones). Default: all of them."""
    output_path: Path = Path("output")
    """Folder of the run folders and of this test's folder."""
    timestamp: str = ""
    """Name of this test's folder. Default: the time."""

    def __post_init__(self) -> None:
        require_range(self, "batch_size num_test_images", 1)
        require_range(self, "num_workers index", 0)


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class CheckedOptions(ReferenceTestOptions):
    """The same with the architecture's flags, whose defaults are the file's values."""

    model: ModelConfig = field(default_factory=ModelConfig)


def test_command() -> int:
    """Run ``python test.py``."""
    return guarded(run_test, sys.argv[1:])


def run_test(args: Sequence[str]) -> int:
    """Load the model, check the flags against it, and run the mode."""
    process.limit_spinning()
    options, _ = parse_known(ReferenceTestOptions, args, prog=PROG)  # others are checked below
    if options.mode == "custom" and options.image_path is None:
        raise ConfigError("--mode custom requires --image_path FILE")
    heads = parse_known(train.FirstOptions, args, prog=PROG, add_help=False)[0].n_attention_heads
    models = ModelOptions(options.model_path, n_attention_heads=heads, device=options.device)
    classifier = load_model(models, options.output_path, default="reference")
    defaults = CheckedOptions(model=classifier.config.model)
    _check_architecture(classifier, parse(CheckedOptions, args, prog=PROG, default=defaults).model)
    folder = options.output_path / (options.timestamp or time.strftime("%Y-%m-%d-%H-%M-%S"))
    run_mode = _test_all if options.mode == "cifar" else _test_one
    return run_mode(classifier, options, folder)


def _check_architecture(classifier: "Classifier", asked: ModelConfig) -> None:
    """Refuse flags that contradict the model file."""
    unknown = {"dropout"} if Path(classifier.source).suffix in (".pt", ".pth") else set()
    for name, actual in vars(classifier.config.model).items():
        if name not in unknown and getattr(asked, name) != actual:
            raise ConfigError(
                f"--{name} is {getattr(asked, name)}, but {classifier.source} has {actual}: "
                "leave it out"
            )


def _test_all(classifier: "Classifier", options: ReferenceTestOptions, folder: Path) -> int:
    """Run ``--mode cifar``: the whole test set; return the exit code."""
    given = ("num_test_images", "num_workers", "batch_size")
    chosen = {name: getattr(options, name) for name in given}
    data = DataOptions(data_path=options.data_path, split="test")
    metrics, code = score(classifier, TestOptions(data=data, **chosen), folder)
    show(metrics, folder)
    out.print(f"Test acc: {metrics.accuracy:.2%}\tTest loss: {metrics.loss:.4f}")
    if not code:
        _show_picture(folder / "confusion_matrix.png", options)
    return code


def _test_one(classifier: "Classifier", options: ReferenceTestOptions, folder: Path) -> int:
    """Run the other modes: print the prediction for one test image or a picture of the user."""
    if options.image_path is not None and options.mode == "custom":
        path, start = options.image_path, "Output:"
        (top,) = classifier.predict([path])
    else:
        path = folder / f"test-{options.index}.png"
        start, top = _predict_indexed(classifier, options, path)
    best, *others = (f"{p.name} {p.probability:.1%}" for p in top)
    print_out(f"{start} {best}(output), then {', '.join(others)}")
    _show_picture(path, options)
    return 0


def _predict_indexed(
    classifier: "Classifier", options: ReferenceTestOptions, path: Path
) -> "tuple[str, Ranking]":
    """Classify one test image and write it, enlarged, to a file; compare with its label."""
    from PIL import Image

    from vitrail.runtime.files import replace_file
    from vitrail.weights.pretrained import of_model_size

    index, data = options.index, DataOptions(data_path=options.data_path, split="test")
    picture_HWC, label = load_image(
        classifier, data, index, folder=path.parent, purpose=f"image {index} classified"
    )
    (top,) = of_model_size(classifier).predict([picture_HWC])
    png = io.BytesIO()
    Image.fromarray(picture_HWC).resize((384, 384), Image.Resampling.NEAREST).save(png, "PNG")
    replace_file(path, png.getvalue())
    return f"{'<Correct>' if top[0].name == label else '<Wrong>'} {label}(label)", top


def _show_picture(path: Path, options: ReferenceTestOptions) -> None:
    """Open a picture in the system's viewer, if there is a screen, without waiting for it."""
    if options.no_image:
        return
    from PIL import Image, ImageShow

    screen = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    with Image.open(path) as image:
        if not (screen and ImageShow.show(image, title=path.name)):
            print_err(f"no screen to show the picture on; it is in {path}")
