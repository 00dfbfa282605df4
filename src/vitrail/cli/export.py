"""``vitrail export``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from vitrail.cli.console import out, say
from vitrail.cli.options import DataOptions, ModelWord, load_model, log_test_use, with_word
from vitrail.cli.parsing import parse
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from vitrail.data.images import ImageSet
    from vitrail.export.graph import ExportSettings
    from vitrail.export.int8 import Agreement
    from vitrail.inference.classifier import Classifier

PROG = "vitrail export"


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ExportOptions(ModelWord):
    """Write a model as a file that other programs run, checked against torch at three batch sizes.

    ``vitrail predict --model_path FILE.onnx`` runs it without torch.
    """

    format: Literal["onnx", "torch"] = "onnx"
    """onnx, or torch for a program of torch.export (.pt2)."""
    attention: bool = False
    """Give the attention of every block as further outputs."""
    raw: bool = False
    """Take bytes (B, H, W, C) and give probabilities: normalising and softmax in the graph."""
    int8: bool = False
    """Weights as 8-bit integers (dynamic quantisation); the accuracy before and after is told."""
    output_path: Path | None = None
    """The file. Default: named after the model, in the current folder."""
    data: DataOptions = field(default_factory=DataOptions)


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail export``."""
    options = with_word(parse(ExportOptions, words, prog=prog))
    path = check(options)
    classifier = load_model(options)
    path = path or default_path(options, Path(classifier.source))
    if options.format == "torch":
        write_program(classifier, options, path)
    else:
        write_onnx(classifier, options, path)
    return 0


def check(options: ExportOptions) -> Path | None:
    """Refuse flags that do not go together; return the file asked for, if any."""
    ending = ".onnx" if options.format == "onnx" else ".pt2"
    if options.format == "torch" and options.int8:
        raise ConfigError("--int8 is for --format onnx: leave out one of the two")
    if not options.int8 and options.data != DataOptions():
        raise ConfigError(
            "--split, --dataset and --data_path are for --int8: give it, or leave them out"
        )
    if options.output_path is not None and options.output_path.suffix != ending:
        raise ConfigError(
            f"output_path is {options.output_path}: give a file that ends in {ending}"
        )
    if options.format == "onnx":
        from vitrail.optional import need

        for module in ("onnx", "onnxscript", "onnxruntime"):
            need(module)
    return options.output_path


def default_path(options: ExportOptions, source: Path) -> Path:
    """Return the file's name: the model's, in the current folder."""
    name = source.name if source.is_dir() else source.stem
    name += "-int8" if options.int8 else ""
    return Path(f"{name}.onnx" if options.format == "onnx" else f"{name}.pt2")


def settings_of(options: ExportOptions) -> "ExportSettings":
    """Return which inputs and outputs are asked for."""
    from vitrail.export.graph import ExportSettings

    return ExportSettings(attention=options.attention, raw=options.raw)


def write_program(classifier: "Classifier", options: ExportOptions, path: Path) -> None:
    """Export by torch.export, check and write."""
    from vitrail.export.program import to_program
    from vitrail.runtime.files import replace_file

    content, difference = to_program(classifier, settings_of(options))
    replace_file(path, content)
    tell(path, len(content), difference)


def write_onnx(classifier: "Classifier", options: ExportOptions, path: Path) -> None:
    """Export as ONNX, check, quantise if asked for, and write."""
    from vitrail.export.onnx_file import to_onnx
    from vitrail.runtime.files import replace_file

    images = measured_images(classifier, options) if options.int8 else None
    say("exporting and checking: this takes up to a minute")
    proto, difference = to_onnx(classifier, settings_of(options))
    content = proto.SerializeToString()
    if images is None:
        replace_file(path, content)
        tell(path, len(content), difference)
        return
    quantise_and_measure(classifier, options, path, proto=proto, images=images)


def measured_images(classifier: "Classifier", options: ExportOptions) -> "ImageSet":
    """Load the split that the accuracies are measured on, before anything takes time."""
    from vitrail.training.run_data import load_split

    split = options.data.split
    images = load_split(classifier, **options.data.to_load())
    if len(images) == 0:
        raise ConfigError(
            "this model was trained without validation images: give --split test or --split train "
            "to measure the accuracy on"
        )
    if images.classes != classifier.classes:
        raise ConfigError(f"{split} has other classes than the model: give its --data_path")
    beside = (options.output_path or Path()).parent
    log_test_use(classifier, split, beside, "vitrail export --int8", len(images))
    return images


def quantise_and_measure(
    classifier: "Classifier", options: ExportOptions, path: Path, *, proto: Any, images: "ImageSet"
) -> None:
    """Quantise, measure the accuracy before and after, write, and tell."""
    from vitrail.export.int8 import compare, quantise
    from vitrail.runtime.files import replace_file

    small = quantise(proto).SerializeToString()
    large = proto.SerializeToString()
    agreement = compare(
        {"float32": large, "int8": small},
        images,
        mean=classifier.mean,
        std=classifier.std,
        raw=options.raw,
    )
    replace_file(path, small)
    show(agreement, {"float32": len(large), "int8": len(small)}, options.data.split)
    say(f"int8 model in {path}")


def show(agreement: "Agreement", sizes: dict[str, int], split: str) -> None:
    """Print what quantising cost."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in ("", f"{split} accuracy", "size"):
        table.add_column(column, justify="right" if column else "left")
    for name, accuracy in agreement.accuracy.items():
        table.add_row(name, f"{accuracy:.2%}", f"{sizes[name] / 1e6:.2f} MB")
    out.print(table)
    out.print(
        f"on {agreement.images:,} images; {agreement.same_class:.2%} get the same class from both",
        markup=False,
        soft_wrap=True,
    )


def tell(path: Path, size: int, difference: float) -> None:
    """Say what was written."""
    from vitrail.export.graph import CHECKED_BATCHES

    batches = ", ".join(map(str, CHECKED_BATCHES))
    out.print(
        f"{path}: {size / 1e6:.2f} MB; differs from torch by {difference:.1e} at most "
        f"(batches of {batches})",
        markup=False,
        soft_wrap=True,
    )
