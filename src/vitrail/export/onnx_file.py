"""A classifier -> an ONNX model, checked in ONNX Runtime before it is written."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from vitrail.errors import ConfigError, ExportError
from vitrail.export.graph import EXAMPLE_BATCH, ExportSettings, Graph, check_outputs
from vitrail.inference.classifier import Classifier
from vitrail.inference.onnx_classifier import OUTPUT_OF_INPUT, write_metadata
from vitrail.optional import import_optional

MAX_BYTES = 2**31
"""Maximum size of a protobuf message, which an ONNX file is."""


def to_onnx(classifier: Classifier, settings: ExportSettings) -> tuple[Any, float]:
    """Return the ONNX model (a ModelProto) and its largest difference from the model.

    Raises:
        ConfigError: an optional package is not installed, or the model is too large for one file.
        ExportError: the exported model computes something else.
    """
    graph = Graph(classifier, settings)
    size = sum(t.numel() * t.element_size() for t in graph.model.state_dict().values())
    if size >= MAX_BYTES:
        raise ConfigError(f"the weights have {size:,} bytes: an ONNX file is limited to 2 GiB")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(module)
    names = [OUTPUT_OF_INPUT[settings.input_name]]
    if settings.attention:
        names += [f"attention_{layer + 1}" for layer in range(len(graph.model.blocks))]
    with _quiet():
        program = torch.onnx.export(
            graph,
            (graph.batch(EXAMPLE_BATCH),),
            input_names=[settings.input_name],
            output_names=names,
            dynamic_shapes=({0: Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    label(proto, write_metadata(classifier.config, classifier.classes, settings.input_name))
    return proto, check_outputs(graph, runner(proto.SerializeToString()))


def label(proto: Any, metadata: dict[str, str]) -> None:
    """Write the metadata and the producer into an ONNX model."""
    import_optional("onnx.helper").set_model_props(proto, metadata)
    proto.producer_name, proto.producer_version = "vitrail", version("vitrail")
    for node in proto.graph.node:
        # Stack traces of the export: source lines and local paths.
        del node.metadata_props[:]


def runner(content: bytes) -> Callable[[Tensor], Sequence[Tensor]]:
    """Return a function that runs the content of an ONNX file in ONNX Runtime on the CPU.

    Raises:
        ExportError: ONNX Runtime rejects the file.
    """
    runtime = import_optional("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise ExportError(f"ONNX Runtime rejects the exported model: {error}") from error
    (name,) = [given.name for given in session.get_inputs()]
    return lambda batch: [torch.from_numpy(out) for out in session.run(None, {name: batch.numpy()})]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of torch's exporter about its internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
