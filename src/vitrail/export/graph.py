"""What is exported: the model as a function of a batch, a check against it, and torch.export."""

import copy
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim

from vitrail.data.images import normalize
from vitrail.errors import ExportError
from vitrail.inference.classifier import Classifier
from vitrail.inference.onnx_classifier import write_metadata
from vitrail.runtime import rng

EXAMPLE_BATCH = 3
"""Batch size of the traced example: not in CHECKED_BATCHES, to detect a fixed batch size."""
CHECKED_BATCHES = (1, 7, 64)
TOLERANCE = 1e-4
"""Maximum difference from the model in any output."""
METADATA = "vitrail.json"
"""Name of the extra file in a .pt2 with the metadata that an ONNX file has."""


@dataclass(frozen=True)
class ExportSettings:
    """Which inputs and outputs an exported model has (see ``inference.onnx_classifier``)."""

    attention: bool = False
    """Return every block's attention as additional outputs."""
    raw: bool = False
    """uint8 in, probabilities out: normalization and softmax are part of the graph."""

    @property
    def input_name(self) -> str:
        """Name of the input."""
        return "raw" if self.raw else "images"


class Graph(nn.Module):
    """The function that is exported.

    Shapes:
        images_BCHW or raw_BHWC -> logits_BY or probabilities_BY, and optionally L attention_BATT
    """

    def __init__(self, classifier: Classifier, settings: ExportSettings) -> None:
        super().__init__()
        self.model = copy.deepcopy(classifier.model).cpu().eval()
        self.mean, self.std, self.settings = classifier.mean, classifier.std, settings

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return scores, and attention if requested."""
        attentions: tuple[Tensor, ...] = ()
        if self.settings.raw:
            batch = normalize(batch.permute(0, 3, 1, 2), self.mean, self.std)
        if self.settings.attention:
            scores_BY, attentions = self.model.forward_with_attention(batch)
        else:
            scores_BY = self.model(batch)
        return (scores_BY.softmax(1) if self.settings.raw else scores_BY, *attentions)

    def batch(self, images: int) -> Tensor:
        """Return N noise images in the input's format, always the same."""
        config = self.model.config
        raw_BHWC = torch.randint(
            256, (images, *config.image_hw, config.n_channels), dtype=torch.uint8,
            generator=rng.generator(0, "export", images),
        )  # fmt: skip
        if self.settings.raw:
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
        ExportError: an output differs by more than TOLERANCE, or has another shape.
    """
    worst = 0.0
    for images in CHECKED_BATCHES:
        batch = graph.batch(images)
        with torch.inference_mode():
            wanted = graph(batch)
        given = run(batch)
        for number, (want, got) in enumerate(zip(wanted, given, strict=True)):
            if want.shape != got.shape:
                raise ExportError(
                    f"output {number} of a batch of {images} is {tuple(got.shape)}, not "
                    f"{tuple(want.shape)}: this version of torch exports it incorrectly"
                )
            worst = max(worst, float((want - got).abs().nan_to_num(nan=torch.inf).max()))
    if worst > TOLERANCE:
        raise ExportError(
            f"the exported model differs from the original by {worst:.1e}, over {TOLERANCE:.0e}"
        )
    return worst


def to_program(classifier: Classifier, settings: ExportSettings) -> tuple[bytes, float]:
    """Return the bytes of a torch.export program (.pt2) and its largest difference from the model.

    It runs with torch alone: ``torch.export.load(path).module()(batch)`` gives a tuple of outputs.

    Raises:
        ExportError: the exported program computes something else.
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
        return content, check_outputs(graph, run)
