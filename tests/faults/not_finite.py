"""A NaN or an infinity in a batch, a weight, a gradient, an average stops training."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faults.damage import begun
from faults.folder import folders, require_equal, tensors
from faults.tally import Tally
from vitrail.config.settings import Config
from vitrail.errors import TrainingError
from vitrail.training.loop import Update
from vitrail.training.run import Run

BAD = (math.nan, math.inf, -math.inf)
Fault = Callable[[], AbstractContextManager[None]]


@contextmanager
def in_tensor(tensor: Tensor, place: int, value: float) -> Iterator[None]:
    """Put a value into a tensor inside the block."""
    flat = tensor.detach().view(-1)
    old = flat[place].clone()
    flat[place] = value
    try:
        yield
    finally:
        flat[place] = old


@contextmanager
def in_gradient(parameter: Tensor, place: int, value: float) -> Iterator[None]:
    """Put a value into a gradient when it is computed, inside the block."""

    def change(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[place] = value
        return changed

    hook = parameter.register_hook(change)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def in_batch(run: Run, field: str, value: float) -> Iterator[None]:
    """Put a value into the next batches inside the block."""
    real: Any = run.batches

    class Changed:
        steps_per_epoch, device = real.steps_per_epoch, real.device

        def __call__(self, step: int) -> Any:
            batch = real(step)
            changed = getattr(batch, field).clone()
            changed[0].view(-1)[-1] = value
            return batch._replace(**{field: changed})

    run.batches = Changed()  # type: ignore[assignment]
    try:
        yield
    finally:
        run.batches = real


def faults(run: Run, random_: random.Random) -> Iterator[tuple[str, Fault]]:
    """Yield each bad value in each part of a batch, each parameter and its gradient."""
    for value in BAD:
        for field in ("images_BCHW", "targets_BY"):
            yield f"{value} in {field}", lambda f=field, v=value: in_batch(run, f, v)
        for name, tensor in run.state.model.named_parameters():
            place = random_.randrange(tensor.numel())
            given = (tensor, place, value)
            yield f"{value} in {name}", lambda g=given: in_tensor(*g)
            yield f"{value} in the gradient of {name}", lambda g=given: in_gradient(*g)


def injected(folder: Path, config: Config, *, every: int = 1, seed: int = 8) -> Tally:
    """Put each fault into the same run in turn; its end must be that of an undisturbed run."""
    tally = Tally("NaN, inf in a batch, a weight, a gradient, the average, the optimizer")
    clean, run = (begun(folder / name, config) for name in ("clean", "faulty"))
    for _ in clean.train():
        pass
    advance(run, run.batches.steps_per_epoch + 1)
    step, kept = run.state.step, folders(run.folder)
    found = list(faults(run, random.Random(seed)))
    for what, fault in found[::every]:
        with tally.trial(what), fault():
            before = {name: tensor.clone() for name, tensor in everything(run).items()}
            require_stopped(run, f"update {step + 1}: stopped before applying it")
            after = everything(run)
            same = all(
                torch.equal(after[n], t) or not t.isfinite().all() for n, t in before.items()
            )
            assert same, "the state was changed"
            assert run.state.step == step, "the step was counted"
            assert folders(run.folder) == kept, "something was saved"
    for what, tensor in hidden(run):
        with tally.trial(what), in_tensor(tensor, 0, math.nan):
            require_not_saved(run)
    with tally.trial("the end"):
        for _ in run.train():
            pass
        one, other = (tensors(folders(r.folder)[-1]) for r in (run, clean))
        require_equal(one, other, "the end")
    return tally


def advance(run: Run, updates: int) -> None:
    """Train for some updates."""
    for event in run.train():
        if isinstance(event, Update) and event.step == updates:
            return


def everything(run: Run) -> dict[str, Tensor]:
    """Return all tensors of a run's state."""
    return {**run.state.tensors(), **{f"best.{n}": t for n, t in run.state.weights().items()}}


def hidden(run: Run) -> list[tuple[str, Tensor]]:
    """Return tensors that no loss depends on yet: of the average and of the optimizer."""
    average = next(iter(run.state.eval_model.parameters()))
    slots = {n: t for n, t in run.state.tensors().items() if n.startswith("optimizer.") and t.ndim}
    return [
        ("nan in the average", average),
        *((f"nan in {n}", t) for n, t in list(slots.items())[:4]),
    ]


def require_stopped(run: Run, words: str) -> None:
    """Require that training stops and names the last good checkpoint."""
    message = error_of(lambda: next(iter(run.train())))
    assert words in message, message
    assert f"the last good checkpoint is {folders(run.folder)[-1]}" in message, message


def require_not_saved(run: Run) -> None:
    """Require that invalid values are not saved."""
    message = error_of(run.save)
    assert "not finite" in message, message


def error_of(action: Callable[[], Any]) -> str:
    """Return the message of the TrainingError that an action raises."""
    try:
        action()
    except TrainingError as error:
        return str(error)
    return "no error"
