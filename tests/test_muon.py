"""Muon: torch's own up to rounding, kernels as matrices, singular values near one."""

import copy

import pytest
import torch
from torch import Tensor, nn

from vitrail.config.settings import TrainingConfig
from vitrail.training.muon import Muon, orthogonalize
from vitrail.training.optim import make_optimizers


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 5), (5, 11), (7, 5), (3, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def loss(parameters: list[nn.Parameter]) -> Tensor:
    return sum((p.cos() * p).sum() for p in parameters)  # type: ignore[return-value]


def test_steps_equal_torchs_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's iteration in float32, too: how bfloat16 is rounded differs between processors.
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
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
        # Five iterations grow a rounding error (2^-24) by 3.4445^5 = 485 at most: 3e-5.
        assert (mine - other).norm() < 1e-4 * moved
        assert moved > 0.1


def test_the_products_use_the_given_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    formats: set[torch.dtype] = set()
    multiply = Tensor.__matmul__

    def watched(one: Tensor, other: Tensor) -> Tensor:
        formats.update((one.dtype, other.dtype))
        return multiply(one, other)

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        formats.clear()
        model = nn.Module()
        model.blocks = nn.Linear(5, 7)
        config = TrainingConfig(optimizer="muon", precision=name)  # type: ignore[arg-type]
        muon = make_optimizers(model, config)[0]
        model.blocks.weight.grad = torch.ones(7, 5)
        muon.step()
        assert formats == {dtype}


def test_a_kernel_is_treated_as_a_matrix() -> None:
    matrix = weights()[:1]
    kernel = [nn.Parameter(matrix[0].detach().clone().view(7, 5, 1, 1))]
    for parameters in (matrix, kernel):
        optimizer = Muon(parameters, lr=0.1)
        loss(parameters).backward()
        optimizer.step()
    assert torch.equal(kernel[0].view(7, 5), matrix[0])
    assert not torch.equal(matrix[0], weights()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 13), (3, 13, 7)])
def test_singular_values_become_nearly_one(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype))
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


def test_weights_without_gradient_do_not_change() -> None:
    parameters = weights()
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, weights(), strict=True))
