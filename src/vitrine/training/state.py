"""Everything that training changes, to and from plain tensors and numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitrine.config import TrainingConfig
from vitrine.model import VisionTransformer
from vitrine.training.optim import freeze_backbone, make_optimizers


@dataclass
class Tally:
    """Sums over the images of the current epoch so far."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def add(self, *, loss: float, correct: int, images: int) -> None:
        """Count one batch in, with its mean loss."""
        self.loss += loss * images
        self.correct += correct
        self.images += images

    def means(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy."""
        return self.loss / self.images, self.correct / self.images


@dataclass
class TrainingState:
    """The model, its moving average, the optimizers, and how far they are.

    ``step`` counts the updates done; it is the loop's only variable.
    """

    model: VisionTransformer
    optimizers: list[Optimizer]
    average: AveragedModel | None
    step: int = 0
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def start(cls, model: VisionTransformer, config: TrainingConfig) -> "TrainingState":
        """Return the state before the first update."""
        if config.freeze_backbone:
            freeze_backbone(model)
        average = None
        if config.ema_decay:
            update = get_ema_multi_avg_fn(config.ema_decay)
            average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        return cls(model, make_optimizers(model, config), average)

    @property
    def best_model(self) -> nn.Module:
        """The weights to test, save and predict with: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; the model that predicts is saved apart, see weights()."""
        tensors = {}
        if self.average is not None:
            tensors.update({f"model.{name}": t for name, t in self.model.state_dict().items()})
            tensors["average.count"] = self.average.n_averaged
        for number, optimizer in enumerate(self.optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                tensors.update(
                    {f"optimizer.{number}.{index}.{slot}": t for slot, t in slots.items()}
                )
        return tensors

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the model that predicts."""
        return dict(self.best_model.state_dict())

    def numbers(self) -> dict[str, Any]:
        """Return all that is not a tensor, as JSON knows it."""
        return {"step": self.step, "seconds": self.seconds, "tally": asdict(self.tally)}

    def restore(
        self,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
    ) -> None:
        """Take over what weights(), tensors() and numbers() gave."""
        self.best_model.load_state_dict(weights)
        if self.average is not None:
            self.model.load_state_dict(under(tensors, "model"))
            self.average.n_averaged.copy_(tensors["average.count"])
        for number, optimizer in enumerate(self.optimizers):
            slots: dict[int, dict[str, Tensor]] = {}
            for name, tensor in under(tensors, f"optimizer.{number}").items():
                index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        self.step, self.seconds = numbers["step"], numbers["seconds"]
        self.tally = Tally(**numbers["tally"])


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix.``, without it."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity."""
    floats = ((n, t) for n, t in tensors.items() if t.is_floating_point())
    return next((name for name, tensor in floats if not tensor.isfinite().all()), None)
