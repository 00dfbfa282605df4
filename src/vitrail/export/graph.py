"""What is exported: the model as one function of one batch, and the check of what came of it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrail.data.images import normalize
from vitrail.errors import ExportError
from vitrail.inference.classifier import Classifier
from vitrail.runtime import rng

EXAMPLE_BATCH = 3
"""Images in the example that is traced: none of CHECKED_BATCHES, so that a frozen size shows."""
CHECKED_BATCHES = (1, 7, 64)
TOLERANCE = 1e-4
"""Largest difference from torch in any output."""


@dataclass(frozen=True)
class ExportSettings:
    """Which inputs and outputs an exported model has (see ``inference.onnx_classifier``)."""

    attention: bool = False
    """Give every block's attention as further outputs."""
    raw: bool = False
    """Take bytes and give probabilities: normalization and softmax are part of the graph."""

    @property
    def input_name(self) -> str:
        """Name of the input."""
        return "raw" if self.raw else "images"


class Graph(nn.Module):
    """The function that is exported.

    Shapes:
        images_BCHW or raw_BHWC -> logits_BY or probabilities_BY, and if asked for L attention_BATT
    """

    def __init__(self, classifier: Classifier, settings: ExportSettings) -> None:
        super().__init__()
        self.model = copy.deepcopy(classifier.model).cpu().eval()
        self.mean, self.std, self.settings = classifier.mean, classifier.std, settings

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return scores, and attention if asked for."""
        attentions: tuple[Tensor, ...] = ()
        if self.settings.raw:
            batch = normalize(batch.permute(0, 3, 1, 2), self.mean, self.std)
        if self.settings.attention:
            scores_BY, attentions = self.model.forward_with_attention(batch)
        else:
            scores_BY = self.model(batch)
        return (scores_BY.softmax(1) if self.settings.raw else scores_BY, *attentions)

    def batch(self, images: int) -> Tensor:
        """Return this many noise pictures as the input takes them; always the same."""
        config = self.model.config
        raw_BHWC = torch.randint(
            256, (images, *config.image_hw, config.n_channels), dtype=torch.uint8,
            generator=rng.generator(0, "export", images),
        )  # fmt: skip
        if self.settings.raw:
            return raw_BHWC
        return normalize(raw_BHWC.permute(0, 3, 1, 2), self.mean, self.std).contiguous()


def check(graph: Graph, run: Callable[[Tensor], Sequence[Tensor]]) -> float:
    """Run both at several batch sizes, none of them the example's; return the largest difference.

    Args:
        graph: what was exported.
        run: what came of it: a batch -> its outputs, in order.

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
                    f"{tuple(want.shape)}: this version of torch exports the model wrongly"
                )
            worst = max(worst, float((want - got).abs().nan_to_num(nan=torch.inf).max()))
    if worst > TOLERANCE:
        raise ExportError(
            f"the exported model differs from torch's by {worst:.1e}, more than {TOLERANCE:.0e}"
        )
    return worst
