"""The reference system's two commands: its flags, our engine.

``python train.py`` and ``python test.py`` at the root hand their words to the functions here.
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

from vitrail.cli import guarded, train
from vitrail.cli.console import out, say
from vitrail.cli.options import DataOptions, ModelOptions, load_model, log_test_use
from vitrail.cli.parsing import parse
from vitrail.cli.test import TestOptions, score, show
from vitrail.config.settings import require_range
from vitrail.errors import ConfigError
from vitrail.runtime import process

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier, Prediction

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
    """Run ``python train.py``: the reference preset, with the reference's flags and ours."""
    return guarded(run_train, sys.argv[1:])


def run_train(words: Sequence[str]) -> int:
    """Translate the reference's flags that we spell otherwise, and train."""
    process.limit_spinning()
    words = [spell_out(word) for word in words]
    words, stamp = take_value(words, "--timestamp", time.strftime("%Y-%m-%d-%H-%M"))
    if not any(named(word, "--resume") for word in words):
        chosen = {"--preset": "reference", "--model_path": "model"}
        for flag, value in chosen.items():
            if not any(named(word, flag) for word in words):
                words = [*words, flag, value]
    return train.command(words, prog="python train.py", name=stamp)


def spell_out(word: str) -> str:
    """Return ``-lr`` as ``--learning_rate``."""
    return "--learning_rate" + word.removeprefix("-lr") if named(word, "-lr") else word


def named(word: str, flag: str) -> bool:
    """Tell whether a word is this flag, in either spelling, with or without its value."""
    return word.partition("=")[0].replace("-", "_") == flag.replace("-", "_")


def take_value(words: Sequence[str], flag: str, default: str) -> tuple[list[str], str]:
    """Remove a flag with its value; return the words left, and the value."""
    left, value, words = [], default, list(words)
    while words:
        word = words.pop(0)
        if not named(word, flag):
            left.append(word)
        elif "=" in word:
            value = word.partition("=")[2]
        elif words:
            value = words.pop(0)
        else:
            raise ConfigError(f"{flag} wants a value")
    return left, value


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ReferenceTestOptions:
    """Test a model as the reference system does.

    The architecture is read from the file; flags that describe it are compared with what it says.
    """

    mode: Literal["cifar", "cifar-single", "custom"] = "cifar"
    """The whole test set, one of its images, or a picture of yours."""
    model_path: str | None = None
    """Run folder, .safetensors or reference .pt; else the newest run, or the bundled model."""
    index: int = 1
    """cifar-single: which test image."""
    image_path: Path | None = None
    """custom: your picture."""
    no_image: bool = False
    """Show no picture."""
    batch_size: int = 128
    """Images at a time."""
    num_workers: int = 2
    """Threads that decode picture files; 0 decodes one at a time, like 1."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, then mps, then cpu."""
    data_path: Path = Path("data")
    """Where the data are."""
    num_test_images: int | None = None
    """Test on the first so many images only."""
    output_path: Path = Path("output")
    """Folder of the run folders, and of this test's files."""
    timestamp: str | None = None
    """Name of the folder for this test's files; the time unless given."""
    image_size: int | None = None
    """Side of the image; checked."""
    n_channels: int | None = None
    """Channels; checked."""
    patch_size: int | None = None
    """Side of a patch; checked."""
    n_classes: int | None = None
    """Classes; checked."""
    embed_dim: int | None = None
    """Width of a token; checked."""
    n_layers: int | None = None
    """Blocks; checked."""
    n_attention_heads: int | None = None
    """Heads; a reference .pt does not tell them, and has 4 unless given."""
    forward_mul: float | None = None
    """Hidden width of the MLP over embed_dim; checked."""
    dropout: float | None = None
    """Dropout in training; testing has none, so it is checked only where the file tells it."""

    def __post_init__(self) -> None:
        require_range(self, "batch_size num_test_images", 1)
        require_range(self, "num_workers index", 0)


def test_command() -> int:
    """Run ``python test.py``."""
    return guarded(run_test, sys.argv[1:])


def run_test(words: Sequence[str]) -> int:
    """Load the model, hold the flags against it, and run the mode."""
    process.limit_spinning()
    options = parse(ReferenceTestOptions, words, prog="python test.py")
    if options.mode == "custom" and options.image_path is None:
        raise ConfigError("--mode custom wants a picture: --image_path FILE")
    heads = options.n_attention_heads
    models = ModelOptions(options.model_path, n_attention_heads=heads, device=options.device)
    classifier = load_model(models, options.output_path)
    check_architecture(classifier, options)
    folder = options.output_path / (options.timestamp or time.strftime("%Y-%m-%d-%H-%M-%S"))
    if options.mode == "cifar":
        return test_all(classifier, options, folder)
    if options.mode == "cifar-single":
        test_single(classifier, options, folder)
    else:
        test_custom(classifier, options)
    return 0


def check_architecture(classifier: "Classifier", options: ReferenceTestOptions) -> None:
    """Refuse flags that say something else than the file."""
    for name in ARCHITECTURE:
        asked, there = getattr(options, name), getattr(classifier.config.model, name)
        told = not (name == "dropout" and is_reference_file(classifier))
        if asked is not None and told and asked != there:
            raise ConfigError(
                f"--{name} is {asked}, but {classifier.source} has {there}: leave it out"
            )


def is_reference_file(classifier: "Classifier") -> bool:
    """Tell whether the model came from a file of the reference system."""
    return Path(classifier.source).suffix in (".pt", ".pth")


def test_all(classifier: "Classifier", options: ReferenceTestOptions, folder: Path) -> int:
    """``--mode cifar``: the test set, as tables and pictures; return the exit code."""
    given = ("num_test_images", "num_workers", "batch_size")
    chosen = {name: getattr(options, name) for name in given}
    data = DataOptions(data_path=options.data_path, split="test")
    scored = score(classifier, TestOptions(output_path=folder, data=data, **chosen))
    metrics = scored.metrics
    show(metrics)
    out.print(f"Test acc: {metrics.accuracy:.2%}\tTest loss: {metrics.loss:.4f}")
    say(f"pictures and metrics.json in {folder}/")
    if scored.problems:
        return scored.report_problems()
    show_picture(folder / "confusion_matrix.png", options)
    return 0


def test_single(classifier: "Classifier", options: ReferenceTestOptions, folder: Path) -> None:
    """``--mode cifar-single``: one test image, its label and what the model says."""
    from PIL import Image

    from vitrail.runtime.files import replace_file
    from vitrail.training.run_data import load_split
    from vitrail.weights.pretrained import of_model_size

    data = DataOptions(data_path=options.data_path, split="test")
    images = load_split(classifier, **data.to_load())
    if not 0 <= options.index < len(images):
        raise ConfigError(f"--index is {options.index}: give 0 to {len(images) - 1}")
    log_test_use(classifier, "test", folder, f"image {options.index} alone", 1)
    raw_CHW = images.raw_BCHW[options.index]
    picture_HWC = raw_CHW.expand(3, -1, -1).permute(1, 2, 0).numpy()
    label = images.classes[int(images.labels_B[options.index])]
    (top,) = of_model_size(classifier).predict([picture_HWC])
    verdict = "<Correct>" if top[0].name == label else "<Wrong>"
    say_result(f"{verdict} {label}(label)\t", top)
    path = folder / f"test-{options.index}.png"
    enlarged = Image.fromarray(picture_HWC).resize((384, 384), Image.Resampling.NEAREST)
    png = io.BytesIO()
    enlarged.save(png, format="PNG")
    replace_file(path, png.getvalue())
    show_picture(path, options)


def test_custom(classifier: "Classifier", options: ReferenceTestOptions) -> None:
    """``--mode custom``: a picture of the user's."""
    assert options.image_path is not None
    (top,) = classifier.predict([options.image_path])
    say_result("Output: ", top)
    show_picture(options.image_path, options)


def say_result(start: str, top: "list[Prediction]") -> None:
    """Print the class with its probability, and the runners-up."""
    from vitrail.errors import printable

    best, *others = (f"{printable(p.name)} {p.probability:.1%}" for p in top)
    line = f"{printable(start.rstrip())}{start[len(start.rstrip()) :]}{best}(output)\tthen "
    out.print(line + ", ".join(others), markup=False, soft_wrap=True)


def show_picture(path: Path, options: ReferenceTestOptions) -> None:
    """Open a picture in the system's viewer, where there is a screen; never wait for it."""
    if options.no_image:
        return
    from PIL import Image, ImageShow

    screen = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    with Image.open(path) as image:
        if not (screen and ImageShow.show(image, title=path.name)):
            say(f"no screen to show it on: the picture is {path}")
