"""The Muon optimizer: orthogonalized momentum for weight matrices, whose norms stay fixed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Muon(Optimizer):
    """Moves weights along the orthogonal matrix nearest to their Nesterov momentum.

    The norm of a step is ``lr`` times the norm of the weight, which is then scaled back to its
    former norm. So one learning rate suits matrices of every shape, and weight decay would have no
    effect. Convolution kernels count as matrices with one row per output channel; matrices of the
    same shape are processed as a batch. A weight of zeros stays zero.

    Args:
        params: weights, or groups of them.
        lr: learning rate: how far a weight moves, as a fraction of its norm.
        momentum: momentum factor.
        dtype: precision of the matrix products of the iteration.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the fixed norm as in
    https://github.com/KellerJordan/cifar10-airbench, airbench94_muon.py.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shape = weight.shape[0], weight[0].numel()  # rows (outputs) and columns
                    by_shape.setdefault(shape, []).append(weight)
            for shape, weights in by_shape.items():
                directions = [self._direction(weight, group["momentum"]) for weight in weights]
                stacked = torch.stack([direction.reshape(shape) for direction in directions])
                for weight, step in zip(weights, orthogonalize(stacked, self.dtype), strict=True):
                    norm = torch.linalg.vector_norm(weight)
                    length = torch.linalg.vector_norm(step).clamp(min=1e-7)
                    weight.sub_(step.view(weight.shape) * (group["lr"] * norm / length))
                    weight.mul_(norm / torch.linalg.vector_norm(weight).clamp(min=1e-30))

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Add the gradient to the momentum and return the Nesterov momentum."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)


def orthogonalize(matrices: Tensor, dtype: torch.dtype, steps: int = 3) -> Tensor:
    """Bring the singular values of each matrix close to 1 by Newton–Schulz iteration.

    Three steps bring those above 1/50 of the Frobenius norm into the range 0.65 to 1.2; five steps,
    those above 1/600.

    Shapes:
        matrices (n, rows, columns) -> the same shape and dtype; computed in ``dtype``.

    Source: Jordan et al. 2024, the quintic with a = 3.4445, b = -4.7750, c = 2.0315.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
