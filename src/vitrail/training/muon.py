"""The Muon optimizer: orthogonalized momentum for weight matrices."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Muon(Optimizer):
    """Updates weights by the orthogonal matrix nearest to their Nesterov momentum.

    Equal to ``torch.optim.Muon`` up to rounding, with three additions: convolution kernels are
    accepted, as matrices with one row per output channel; matrices of the same shape are processed
    as a batch; and ``dtype`` is the precision of the iteration. (torch always uses bfloat16, which
    took a quarter of a training step on hardware that emulates it: docs/log.md.)

    Args:
        params: weights, or groups of them.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: momentum factor.
        dtype: precision of the matrix products of the iteration.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(_matrix_shape(weight), []).append(weight)
            for (rows, columns), weights in by_shape.items():
                directions = [self._direction(weight, group["momentum"]) for weight in weights]
                stacked = torch.stack([d.reshape(rows, columns) for d in directions])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for weight, step in zip(weights, orthogonalize(stacked, self.dtype), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step.view(weight.shape), alpha=-rate)

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Add the gradient to the momentum and return the Nesterov momentum."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Return rows (outputs) and columns (all other dimensions) of a weight as a matrix."""
    return weight.shape[0], weight[0].numel()


def orthogonalize(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Move the singular values of each matrix close to 1 (0.7 to 1.2) by Newton–Schulz iteration.

    Shapes:
        matrices (n, rows, columns) -> the same shape and dtype; computed in ``dtype``.

    Source: Jordan et al. 2024, the quintic with a = 3.4445, b = -4.7750, c = 2.0315.
    """
    x: Tensor = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
