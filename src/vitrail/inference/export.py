"""Export a classifier to ONNX or a torch program; outputs are compared before it is written."""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vitrail.data.images import normalize
from vitrail.errors import ConfigError, ExportError, import_optional
from vitrail.evaluation.calibration import distance
from vitrail.inference.classifier import Classifier
from vitrail.inference.onnx_classifier import OUTPUT_OF_INPUT, OnnxClassifier, write_metadata
from vitrail.runtime import rng

EXAMPLE_BATCH = 3
"""Batch size of the traced example: not in CHECKED_BATCHES, to detect a fixed batch size."""
CHECKED_BATCHES = (1, 7, 64)
TOLERANCE = 1e-4
"""Maximum difference from the model in any output."""
METADATA = "vitrail.json"
"""Name of the extra file in a .pt2 that holds the same metadata as an ONNX file."""
MAX_BYTES = 2**31
"""Maximum size of a protobuf message, which an ONNX file is."""


class Graph(nn.Module):
    """The function that is exported.

    Shapes:
        images_BCHW or raw_BHWC -> logits_BY or probabilities_BY, and optionally L attention_BATT
        and distance_B
    """

    def __init__(self, classifier: Classifier, *, attention: bool = False, raw: bool = False):
        super().__init__()
        self.model = copy.deepcopy(classifier.model).cpu().eval()
        self.mean, self.std = classifier.mean, classifier.std
        self.calibration = classifier.calibration
        self.attention, self.raw = attention, raw
        self.measures_distance = bool(classifier.calibration.mean)
        if self.measures_distance:
            mean_D, directions_KD = map(torch.from_numpy, classifier.calibration.subspace)
            self.register_buffer("mean_D", mean_D)
            self.register_buffer("directions_KD", directions_KD)

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return scores, attention if requested, and the distance if it is known."""
        if self.raw:
            batch = normalize(batch.permute(0, 3, 1, 2), self.mean, self.std)
        layers = range(1, len(self.model.blocks) + 1) if self.attention else ()
        features_BD, attentions = self.model.features_with_attention(batch, layers)
        scores_BY = self.calibration.scale(self.model.head(features_BD))
        outputs = [scores_BY.softmax(1) if self.raw else scores_BY, *attentions]
        if self.measures_distance:
            outputs.append(distance(features_BD, self.mean_D, self.directions_KD))
        return tuple(outputs)

    def batch(self, images: int) -> Tensor:
        """Return noise images in the input's format, the same every time."""
        config = self.model.config
        raw_BHWC = torch.randint(
            256, (images, *config.image_hw, config.n_channels), dtype=torch.uint8,
            generator=rng.generator(0, "export", images),
        )  # fmt: skip
        if self.raw:
            return raw_BHWC
        return normalize(raw_BHWC.permute(0, 3, 1, 2), self.mean, self.std).contiguous()


def check_outputs(graph: Graph, run: Callable[[Tensor], Sequence[Tensor]]) -> float:
    """Compare outputs at several batch sizes, none of them the example's.

    Args:
        graph: what was exported.
        run: the exported program: a batch -> its outputs, in order.

    Returns:
        the largest difference.

    Raises:
        ExportError: an output differs by more than TOLERANCE, or has a different shape.
    """
    worst = 0.0
    for images in CHECKED_BATCHES:
        batch = graph.batch(images)
        with torch.inference_mode():
            wanted, given = graph(batch), run(batch)
        for number, (want, got) in enumerate(zip(wanted, given, strict=True)):
            if want.shape != got.shape:
                raise ExportError(
                    f"output {number} of a batch of {images} is {tuple(got.shape)}, not "
                    f"{tuple(want.shape)}: this version of torch exports it incorrectly"
                )
            if number == 0 and not graph.raw:
                # Undoing the label smoothing amplifies the rounding of improbable classes' logits.
                want, got = want.softmax(1), got.softmax(1)
            worst = max(worst, float((want - got).abs().nan_to_num(nan=torch.inf).max()))
    if worst > TOLERANCE:
        raise ExportError(
            f"the exported model differs from the original by {worst:.1e}, over {TOLERANCE:.0e}"
        )
    return worst


def to_program(
    classifier: Classifier, *, attention: bool = False, raw: bool = False
) -> tuple[bytes, float]:
    """Return the bytes of a torch.export program (.pt2) and its largest difference from the model.

    It runs with torch alone: ``torch.export.load(path).module()(batch)`` gives a tuple of outputs.

    Raises:
        ExportError: the exported program's outputs differ from the model's.
    """
    graph = Graph(classifier, attention=attention, raw=raw)
    program = torch.export.export(
        graph, (graph.batch(EXAMPLE_BATCH),), dynamic_shapes=({0: Dim("batch")},)
    )
    metadata = _metadata(classifier, raw=raw)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
    content = file.getvalue()
    return content, check_outputs(graph, torch.export.load(io.BytesIO(content)).module())


def to_onnx(
    classifier: Classifier, *, attention: bool = False, raw: bool = False
) -> tuple[Any, float]:
    """Return the ONNX model (a ModelProto) and its largest difference from the model.

    Raises:
        ConfigError: an optional package is not installed, or the model is too large for one file.
        ExportError: the exported model's outputs differ from the original's.
    """
    graph = Graph(classifier, attention=attention, raw=raw)
    size = sum(t.numel() * t.element_size() for t in graph.model.state_dict().values())
    if size >= MAX_BYTES:
        raise ConfigError(f"the weights have {size:,} bytes: an ONNX file is limited to 2 GiB")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(module)
    input_name = "raw" if raw else "images"
    layers = range(1, len(graph.model.blocks) + 1) if attention else ()
    outputs = [OUTPUT_OF_INPUT[input_name], *(f"attention_{n}" for n in layers)]
    outputs += ["distance"] * graph.measures_distance
    with _quiet():
        program = torch.onnx.export(
            graph,
            (graph.batch(EXAMPLE_BATCH),),
            input_names=[input_name],
            output_names=outputs,
            dynamic_shapes=({0: Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _label(proto, _metadata(classifier, raw=raw))
    session = _open_session(proto.SerializeToString())

    def run(batch: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {input_name: batch.numpy()})]

    return proto, check_outputs(graph, run)


def _metadata(classifier: Classifier, *, raw: bool) -> dict[str, str]:
    """Return a file's metadata."""
    distances = classifier.calibration.distances
    return write_metadata(classifier.config, classifier.classes, raw=raw, distances=distances)


def _label(proto: Any, metadata: dict[str, str]) -> None:
    """Write the metadata and the producer into an ONNX model."""
    del proto.metadata_props[:]
    import_optional("onnx.helper").set_model_props(proto, metadata)
    proto.producer_name, proto.producer_version = "vitrail", version("vitrail")
    for node in proto.graph.node:
        # Stack traces of the export: source lines and local paths.
        del node.metadata_props[:]


def _open_session(content: bytes) -> Any:
    """Return an ONNX Runtime session on the CPU for the content of an ONNX file.

    Raises:
        ExportError: ONNX Runtime rejects the file.
    """
    runtime = import_optional("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise ExportError(f"ONNX Runtime rejects the exported model: {error}") from error


@contextlib.contextmanager
def _quiet(name: str = "torch.onnx") -> Iterator[None]:
    """Suppress the warnings of a logger; by default, of torch's exporter about its internals."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def quantize(proto: Any) -> Any:
    """Return the ONNX model with the weights of its linear layers as int8, scaled per channel.

    Tokens are quantized at run time (dynamic quantization), so no data is needed. The attention
    products, the stem and the norms stay in float32. The integers use 7 bits: with 8, processors
    without VNNI instructions overflow within a product.
    """
    quantization = import_optional("onnxruntime.quantization")
    with TemporaryDirectory() as folder, _quiet("root"):  # it recommends preprocessing
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
        small = import_optional("onnx").load(str(after))
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    metadata.pop("distances", None)  # features of 7-bit weights are farther away
    _label(small, metadata)
    return small


def classify(content: bytes, classifier: Classifier, raw_BCHW: Tensor) -> Tensor:
    """Return the classes that an ONNX file exported from a classifier predicts for images."""
    exported = OnnxClassifier(_open_session(content), classifier.config, classifier.classes)
    raw_BHWC = raw_BCHW.permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(exported.raw_logits(raw_BHWC).argmax(axis=1))
