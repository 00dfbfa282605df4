"""The state of training (model, optimizers, counters), and how it is saved and restored."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitrail.config.settings import TrainingConfig
from vitrail.errors import CheckpointError
from vitrail.model.vit import VisionTransformer
from vitrail.training.optim import freeze_backbone, make_optimizers

SLOTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
"""The state that an optimizer keeps for each parameter."""
RESTORE_ERRORS = (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError)
"""What restoring the state of another model may raise."""


@dataclass
class Tally:
    """Sums over the images of the current epoch."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def add(self, *, loss: float, correct: int, images: int) -> None:
        """Add one batch with its mean loss."""
        self.loss += loss * images
        self.correct += correct
        self.images += images

    def means(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy."""
        return self.loss / self.images, self.correct / self.images


@dataclass
class TrainingState:
    """The model, its moving average, the optimizers, and the progress.

    ``step`` is the number of updates done, the only loop variable.
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
            update = _warming_average(config.ema_decay)
            average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        return cls(model, make_optimizers(model, config), average)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate and save: the moving average if there is one."""
        return self.model if self.average is None else self.average.module

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, except those of ``eval_model``: see weights()."""
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
        """Return the weights of ``eval_model``."""
        return dict(self.eval_model.state_dict())

    def numbers(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as JSON values."""
        return {"step": self.step, "seconds": self.seconds, "tally": asdict(self.tally)}

    def restore(
        self,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
    ) -> None:
        """Restore what weights(), tensors() and numbers() returned.

        Raises:
            CheckpointError: it belongs to another model or optimizer.
        """
        try:
            self.eval_model.load_state_dict(weights)
            if self.average is not None:
                self.model.load_state_dict(_under(tensors, "model"))
                self.average.n_averaged.copy_(tensors["average.count"])
            for number, optimizer in enumerate(self.optimizers):
                _restore_optimizer(optimizer, _under(tensors, f"optimizer.{number}"))
            tally = Tally(**numbers["tally"])
            self.step, self.seconds = int(numbers["step"]), float(numbers["seconds"])
            self.tally = Tally(float(tally.loss), int(tally.correct), int(tally.images))
        except RESTORE_ERRORS as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"the saved training state does not match the settings: {reason:.200}"
            ) from error


def _restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state of every parameter from tensors named ``INDEX.SLOT``."""
    slots: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, slot = name.split(".")
        same = tensor.shape in ((), parameters[int(index)].shape)
        if not (same and tensor.is_floating_point()):
            raise ValueError(f"{slot} is {tensor.dtype} of shape {tuple(tensor.shape)}")
        slots.setdefault(int(index), {})[slot] = tensor
    expected = SLOTS.get(type(optimizer).__name__)
    complete = len(slots) == len(parameters) and all(set(s) == expected for s in slots.values())
    if slots and expected and not complete:
        raise ValueError(f"{type(optimizer).__name__} lacks some of {sorted(expected)}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _warming_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return an update function for AveragedModel with a decay that warms up to ``decay``.

    After n updates it is ``min(decay, (1 + n) / (10 + n))``, so that the initial weights do not
    dominate the average of a short run. The first update is copied.

    Source: TensorFlow's ExponentialMovingAverage, ``num_updates``; timm's ModelEmaV3.
    """

    def update(averages: Any, weights: Any, count: Any) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(now)(averages, weights, count)

    return update


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix.``, without it."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity."""
    floats = ((n, t) for n, t in tensors.items() if t.is_floating_point())
    return next((name for name, tensor in floats if not tensor.isfinite().all()), None)
