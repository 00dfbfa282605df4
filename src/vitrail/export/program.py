"""A classifier -> the bytes of a torch.export program (.pt2), checked before anything is kept."""

import io
import json

import torch
from torch.export import Dim

from vitrail.export.graph import EXAMPLE_BATCH, ExportSettings, Graph, check
from vitrail.inference.classifier import Classifier
from vitrail.inference.onnx_classifier import write_metadata

METADATA = "vitrail.json"
"""Name of the extra file in a .pt2 with the metadata that an ONNX file has."""


def to_program(classifier: Classifier, settings: ExportSettings) -> tuple[bytes, float]:
    """Return the content of a .pt2 file and its largest difference from torch.

    It runs with torch alone: ``torch.export.load(path).module()(batch)`` gives a tuple of outputs.

    Raises:
        ExportError: what was exported does not compute what the model does.
    """
    graph = Graph(classifier, settings)
    program = torch.export.export(
        graph, (graph.batch(EXAMPLE_BATCH),), dynamic_shapes=({0: Dim("batch")},)
    )
    metadata = write_metadata(classifier.config, classifier.classes, settings.input_name)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
    content = file.getvalue()
    run = torch.export.load(io.BytesIO(content)).module()
    with torch.inference_mode():
        return content, check(graph, run)
