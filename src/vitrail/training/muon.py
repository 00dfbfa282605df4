"""Muon: momentum for weight matrices, made orthogonal before each step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Muon(Optimizer):
    """Steps along the nearest orthogonal matrix to the momentum (Nesterov's).

    Convolution kernels count as matrices of one row an output channel. The result is that of
    ``torch.optim.Muon`` but for rounding. Three things differ: kernels are taken, matrices of one
    shape are worked on together, and the iteration multiplies in ``dtype``. (torch's own always
    takes bfloat16; where the hardware emulates it that was a quarter of a training step:
    docs/log.md.)

    Args:
        params: weights, or groups of them.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: share of the momentum that is kept at each step.
        dtype: number format of the iteration's products.

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
        """Make one update of every weight that has a gradient."""
        assert closure is None, "Muon evaluates no closure"
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(matrix_shape(weight), []).append(weight)
            for (rows, columns), weights in by_shape.items():
                directions = [self.direction(weight, group["momentum"]) for weight in weights]
                stacked = torch.stack([d.reshape(rows, columns) for d in directions])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for weight, step in zip(weights, orthogonalise(stacked, self.dtype), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step.view(weight.shape), alpha=-rate)

    def direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Add the gradient to the momentum and return Nesterov's look ahead."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Return rows and columns of a weight seen as a matrix: outputs by all the rest."""
    return weight.shape[0], weight[0].numel()


def orthogonalise(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Bring all singular values of each matrix near 1 (0.7 to 1.2) by Newton–Schulz iteration.

    Shapes:
        matrices (n, rows, columns) -> the same, in their own dtype; the products are in ``dtype``.

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
