"""Muon: torch's own up to rounding, kernels as matrices, singular values near one."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vitrine.training.muon import Muon, orthogonalise


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 5), (5, 11), (7, 5), (3, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def loss(parameters: list[nn.Parameter]) -> Tensor:
    return sum((p.cos() * p).sum() for p in parameters)  # type: ignore[return-value]


def test_it_steps_as_torchs_own_but_for_rounding() -> None:
    ours, theirs = weights(), weights()
    optimizers = [
        Muon(ours, lr=0.03, weight_decay=0.2),
        torch.optim.Muon(theirs, lr=0.03, weight_decay=0.2),
    ]
    for _ in range(4):
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss(parameters).backward()
            optimizer.step()
    start = weights()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() < 0.04 * moved  # torch's iteration runs in bfloat16
        assert moved > 0.1


def test_a_kernel_steps_as_the_matrix_of_its_rows() -> None:
    matrix = weights()[:1]
    kernel = [nn.Parameter(matrix[0].detach().clone().view(7, 5, 1, 1))]
    for parameters in (matrix, kernel):
        optimizer = Muon(parameters, lr=0.1)
        loss(parameters).backward()
        optimizer.step()
    assert torch.equal(kernel[0].view(7, 5), matrix[0])
    assert not torch.equal(matrix[0], weights()[0])


@pytest.mark.parametrize("shape", [(2, 7, 13), (3, 13, 7)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.shape == (shape[0], 7)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.linalg.svdvals(matrices).max() > 3


def test_a_zero_gradient_moves_nothing() -> None:
    parameters = weights()
    before = copy.deepcopy(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    Muon(parameters, lr=0.1).step()
    for now, then in zip(parameters, before, strict=True):
        assert torch.equal(now, then)


def test_weights_without_gradient_are_left_alone() -> None:
    parameters = weights()
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, weights(), strict=True))
