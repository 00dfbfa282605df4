"""``vitrail export``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from vitrail.cli.console import number_table, out, print_err, print_out
from vitrail.cli.options import (
    DataOptions,
    ModelArgument,
    load_labeled,
    load_model,
    log_test_use,
    name_of,
)
from vitrail.cli.parsing import parse
from vitrail.errors import ConfigError, import_optional
from vitrail.runtime.files import replace_file

if TYPE_CHECKING:
    from vitrail.data.images import ImageSet
    from vitrail.inference.classifier import Classifier


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ExportOptions(ModelArgument):
    """Export a model to a file for other programs, checked against torch at three batch sizes.

    vitrail predict --model_path FILE.onnx runs it without torch.

    For example:
      vitrail export output/quick --raw --output_path shapes.onnx
    """

    format: Literal["onnx", "torch"] = "onnx"
    """onnx (.onnx), or torch: a program of torch.export (.pt2)."""
    attention: bool = False
    """Add the attention of every block as outputs."""
    raw: bool = False
    """Take bytes (B, H, W, C), return probabilities: normalization and softmax are in the graph."""
    int8: bool = False
    """8-bit integer weights (dynamic quantization); reports the accuracy before and after, on
    --split."""
    output_path: Path | None = None
    """The file. Default: named after the model, in the current folder."""
    data: DataOptions = field(default_factory=DataOptions)


def command(args: Sequence[str]) -> int:
    """Run ``vitrail export``."""
    options = parse(ExportOptions, args, prog="vitrail export")
    ending = ".onnx" if options.format == "onnx" else ".pt2"
    _check(options, ending)
    classifier = load_model(options)
    name = name_of(classifier.source)
    path = options.output_path or Path(f"{name}{'-int8' if options.int8 else ''}{ending}")
    (_write_program if options.format == "torch" else _write_onnx)(classifier, options, path)
    return 0


def _check(options: ExportOptions, ending: str) -> None:
    """Refuse flags that exclude each other, and a missing library, before anything slow."""
    if options.format == "torch" and options.int8:
        raise ConfigError("--int8 is for --format onnx: leave one of them out")
    if not options.int8 and options.data != DataOptions():
        raise ConfigError(
            "--split, --dataset and --data_path are for --int8: give it, or leave them out"
        )
    if options.output_path is not None and options.output_path.suffix != ending:
        raise ConfigError(
            f"output_path is {options.output_path}: give a file that ends in {ending}"
        )
    if options.format == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            import_optional(module)


def _write_program(classifier: "Classifier", options: ExportOptions, path: Path) -> None:
    """Export with torch.export, check and write."""
    from vitrail.inference.export import to_program

    content, difference = to_program(classifier, attention=options.attention, raw=options.raw)
    replace_file(path, content)
    _report(path, len(content), difference)


def _write_onnx(classifier: "Classifier", options: ExportOptions, path: Path) -> None:
    """Export to ONNX, check, quantize if asked for, and write."""
    from vitrail.inference.export import classify, quantize, to_onnx

    images = measured_images(classifier, options) if options.int8 else None
    print_err("exporting and checking (up to a minute)")
    proto, difference = to_onnx(classifier, attention=options.attention, raw=options.raw)
    content = proto.SerializeToString()
    if images is None:
        replace_file(path, content)
        _report(path, len(content), difference)
        return
    files = {"float32": content, "int8": quantize(proto).SerializeToString()}
    predicted = {n: classify(file, classifier, images.raw_BCHW) for n, file in files.items()}
    replace_file(path, files["int8"])
    table = number_table("", f"{options.data.split} accuracy", "size")
    for name, guess_B in predicted.items():
        accuracy = float((guess_B == images.labels_B).double().mean())
        table.add_row(name, f"{accuracy:.2%}", f"{len(files[name]) / 1e6:.2f} MB")
    out.print(table)
    same = float((predicted["float32"] == predicted["int8"]).double().mean())
    print_out(f"{len(images):,} images; {same:.2%} get the same class from both")
    print_err(f"int8 model in {path}")


def measured_images(classifier: "Classifier", options: ExportOptions) -> "ImageSet":
    """Load the split that the accuracies are measured on, before anything slow."""
    split = options.data.split
    images = load_labeled(classifier, options.data)
    if len(images) == 0:
        raise ConfigError(
            "this model was trained without validation images: give --split test or --split train "
            "to measure the accuracy on"
        )
    beside = (options.output_path or Path()).parent
    log_test_use(classifier, split, beside, "vitrail export --int8", len(images))
    return images


def _report(path: Path, size: int, difference: float) -> None:
    """Print what was written."""
    from vitrail.inference.export import CHECKED_BATCHES

    batches = ", ".join(map(str, CHECKED_BATCHES))
    print_out(
        f"{path}: {size / 1e6:.2f} MB; differs from torch by at most {difference:.1e} "
        f"(batches of {batches})"
    )
