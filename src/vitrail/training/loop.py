"""The training loop: a generator over all updates, a function for one."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.config.settings import Config, ModelConfig
from vitrail.data.batches import Batch, Batches
from vitrail.errors import TrainingError
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import distributed, rng
from vitrail.runtime.hardware import choose_compile, choose_precision
from vitrail.training.optim import multiplier, set_learning_rate
from vitrail.training.state import Tally, TrainingState


@dataclass(frozen=True)
class Update:
    """The outcome of one update. ``step`` counts the updates done, including this one."""

    step: int
    epoch: int
    loss: float
    correct: int
    images: int
    learning_rate: float
    ends_epoch: bool


def train(state: TrainingState, batches: Batches, config: Config) -> Iterator[Update]:
    """Train from ``state.step`` to the end, yielding after every update.

    Between two updates the state is consistent: it may be saved or evaluated. All random numbers
    are functions of the step, so a resumed run is bit-for-bit equal to an uninterrupted one (on
    the same device, with the same number of threads).

    Raises:
        TrainingError: the loss, the gradient or a weight is not finite; the state is left as
            it was after the previous update.
    """
    device = batches.device
    updates = config.training.epochs * batches.steps_per_epoch
    compiled = choose_compile(config.training.compile, device, updates)
    forward = torch.compile(state.model) if compiled else state.model
    for step in range(state.step, updates):
        began = time.perf_counter()
        share = multiplier(step, config.training, steps_per_epoch=batches.steps_per_epoch)
        set_learning_rate(state.optimizers, share)
        batch = batches(step)
        with rng.seeded(config.run.seed, "dropout", distributed.own_index(step), device=device):
            loss, correct = _train_step(state, forward, batch, config)
        if step % batches.steps_per_epoch == 0:
            state.tally = Tally()
        state.tally.add(loss=loss, correct=correct, images=len(batch.labels_B))
        state.step = step + 1
        state.seconds += time.perf_counter() - began
        yield Update(
            step=state.step,
            epoch=step // batches.steps_per_epoch + 1,
            loss=loss,
            correct=correct,
            images=len(batch.labels_B),
            learning_rate=config.training.learning_rate * share,
            ends_epoch=state.step % batches.steps_per_epoch == 0,
        )


def count_flops(config: ModelConfig) -> tuple[int, int]:
    """Return the floating-point operations per image, for inference and for training.

    Counted as torch does: matrix products and convolutions, a multiply-add as two operations. The
    optimizer is not included.
    """
    with torch.device("meta"):
        model = VisionTransformer(config).to("meta")
        images_BCHW = torch.empty(2, config.n_channels, *config.image_hw)
    with FlopCounterMode(display=False) as counter:
        logits_BY = model(images_BCHW)
        forward = counter.get_total_flops()
        logits_BY.sum().backward()
    return forward // 2, counter.get_total_flops() // 2


def _train_step(
    state: TrainingState, forward: Callable[[Tensor], Tensor], batch: Batch, config: Config
) -> tuple[float, int]:
    """Make one update; return the mean loss and the number of correct predictions."""
    set_training_mode(state.model, frozen=config.training.freeze_backbone)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    loss_sum, correct_sum = _backward(forward, batch, config)
    distributed.merge(state.model, loss_sum, correct_sum)
    loss, correct = loss_sum.item(), int(correct_sum.item())
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # The weights, too: before a tanh, an infinite one leaves both loss and gradient finite.
    size = torch.nn.utils.get_total_norm(parameters)
    if not (math.isfinite(loss) and math.isfinite(norm + size)):
        raise TrainingError(
            f"loss {loss}, gradient norm {float(norm)}, weight norm {float(size)} at update "
            f"{state.step + 1}: stopped before applying it. Lower learning_rate, raise "
            "warmup_epochs, or set clip_norm 1.0"
        )
    if config.training.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.training.clip_norm, norm)
    for optimizer in state.optimizers:
        optimizer.step()
    if state.average is not None:
        state.average.update_parameters(state.model)
    return loss, correct


def set_training_mode(model: VisionTransformer, *, frozen: bool) -> None:
    """Put the model in training mode; with a frozen backbone, only the head.

    In evaluation mode the backbone's batch norm keeps its statistics, and there is no dropout.
    """
    model.train(not frozen)
    model.head.train()


def _backward(
    forward: Callable[[Tensor], Tensor], batch: Batch, config: Config
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of the batch's mean loss; return loss and correct count.

    Each rank processes its share of the batch; ``distributed.merge`` adds the shares up.
    """
    device, total = batch.labels_B.device, len(batch.labels_B)
    dtype = choose_precision(config.training.precision, device)
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    parts = [distributed.share(tensor).chunk(config.training.accumulate) for tensor in batch]
    for images_BCHW, targets_BY, labels_B in zip(*parts, strict=True):
        if len(labels_B) == 0:  # the last batch has fewer images than ranks
            continue
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits_BY = forward(images_BCHW)
        loss = F.cross_entropy(
            logits_BY.float(), targets_BY, label_smoothing=config.training.label_smoothing
        )
        loss = loss * (len(labels_B) / total)
        loss.backward()
        loss_sum += loss.detach()
        correct += (logits_BY.argmax(dim=1) == labels_B).sum()
    return loss_sum, correct
