"""The words of ``vitrail predict`` and ``vitrail explain`` -> the pictures that they name."""

from collections.abc import Sequence
from pathlib import Path

from vitrail.cli.console import say
from vitrail.errors import ConfigError, PictureError
from vitrail.weights import bundled

STDIN = "-"
MODEL_ENDINGS = (
    ".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".npz", ".onnx", ".pt2",
)  # fmt: skip
MODEL_FILES = ("checkpoint.json", "model.safetensors", "pytorch_model.bin")
"""A folder that holds one of these is a checkpoint, or the weights of another system."""


def list_pictures(words: Sequence[str]) -> list[str]:
    """Return the names of all pictures that the words stand for; ``-`` is standard input.

    The plots in run folders are no pictures to classify: a search of a folder above them leaves
    them out, and reports it.

    Raises:
        ConfigError: a word is a model.
        PictureError: a word stands for no picture.
    """
    for word in words:
        if not word:
            raise PictureError("'' is an empty name: give a picture, a folder or a glob")
        if is_model(word):
            raise ConfigError(f"{word} is a model, not a picture: give --model_path {word}")
    return [name for word in words for name in ([word] if word == STDIN else search(word))]


def search(word: str) -> list[str]:
    """Return the names of the pictures that one word stands for."""
    from vitrail.data.pictures import find_pictures  # here, since --help need not load Pillow

    found, root = find_pictures([word]), Path(word)
    runs = {path: run_above(path, root) for path in found}
    plots = [path for path in found if runs[path]]
    if plots:
        folders = ", ".join(sorted({str(runs[path]) for path in plots}))
        if len(plots) == len(found):
            raise PictureError(f"{word}: its only pictures are the plots of runs: {folders}")
        say(f"{word}: left out {len(plots)} plots of runs: {folders}")
    return [str(path) for path in found if not runs[path]]


def run_above(path: Path, root: Path) -> Path | None:
    """Return the run folder, below the folder that is searched, that a picture lies in."""
    for folder in path.parents:
        if folder == root or root not in folder.parents:
            return None
        if (folder / "checkpoints").is_dir():
            return folder
    return None


def is_model(word: str) -> bool:
    """Return whether a word can only be meant as a model."""
    path = Path(word)
    try:
        if path.is_dir():
            run = (path / "checkpoints").is_dir() and (path / "config.json").is_file()
            return run or any((path / name).is_file() for name in MODEL_FILES)
        if path.is_file():
            return path.name.lower().endswith(MODEL_ENDINGS)
    except OSError:  # for example, a name that is too long: the search reports it
        return False
    return word in bundled.names() or word.startswith("hf:")
