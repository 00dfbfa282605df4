"""An ONNX model with 8-bit weights, and their effect on accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vitrail.data.images import ImageSet, normalize
from vitrail.export.onnx_file import label, runner
from vitrail.optional import import_optional


def quantize(proto: Any) -> Any:
    """Return the ONNX model with the weights of its linear layers as int8, scaled per channel.

    Tokens are quantized at run time (dynamic quantization), so no data is needed. The
    products of attention, the stem and the norms stay in float32. The integers use 7 bits: with 8,
    processors without VNNI instructions overflow within a product.
    """
    quantization = import_optional("onnxruntime.quantization")
    onnx = import_optional("onnx")
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    with TemporaryDirectory() as folder:
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(proto.SerializeToString())
        quantization.quantize_dynamic(
            before,
            after,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
        )
        small = onnx.load(str(after))
    del small.metadata_props[:]
    label(small, metadata)
    return small


@dataclass(frozen=True)
class Agreement:
    """Accuracy of two files on the same images, and how often they agree."""

    images: int
    accuracy: Mapping[str, float]
    """Fraction of images classified correctly, by file."""
    same_class: float
    """Fraction of images for which both predict the same class."""


def compare(
    files: Mapping[str, bytes],
    images: ImageSet,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    raw: bool,
) -> Agreement:
    """Compare the predictions of two ONNX files on the same images."""
    predicted = {}
    for name, content in files.items():
        run = runner(content)
        parts: list[Tensor] = []
        for raw_BCHW in images.raw_BCHW.split(100):
            batch = raw_BCHW.permute(0, 2, 3, 1) if raw else normalize(raw_BCHW, mean, std)
            parts.append(run(batch.contiguous())[0].argmax(dim=1))
        predicted[name] = torch.cat(parts)
    first_B, second_B = predicted.values()
    accuracy = {name: _fraction(guess_B == images.labels_B) for name, guess_B in predicted.items()}
    return Agreement(len(images), accuracy, _fraction(first_B == second_B))


def _fraction(right_B: Tensor) -> float:
    """Return the fraction of true values."""
    return float(right_B.double().mean())
