"""Muon: torch's steps at a fixed norm, kernels as matrices, singular values near one."""

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


def test_a_step_is_a_fraction_of_the_norm_which_stays() -> None:
    before, parameters = weights(), weights()
    optimizer = Muon(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(parameters).backward()
        optimizer.step()
    for now, then in zip(parameters, before, strict=True):
        assert now.norm().item() == pytest.approx(then.norm().item(), rel=1e-5)
        # Three steps of a tenth each, on a sphere.
        assert 0.15 < (now - then).norm() / then.norm() < 0.31


def test_it_follows_torchs_own_on_a_sphere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's update, from the same momentum, scaled to ``lr`` times the norm."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)  # torch's iteration in float32, too
    ours, theirs = weights(), weights()
    mine = Muon(ours, lr=0.1, momentum=0.8)
    reference = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.0, momentum=0.8, ns_steps=3)
    for _ in range(4):
        for optimizer, parameters in ((mine, ours), (reference, theirs)):
            optimizer.zero_grad()
            loss(parameters).backward()
        starts = [p.detach().clone() for p in theirs]
        mine.step()
        reference.step()
        with torch.no_grad():
            for own, other, start in zip(ours, theirs, starts, strict=True):
                step = (other - start) / (other - start).norm()
                moved = start + 0.1 * start.norm() * step
                other.copy_(moved * start.norm() / moved.norm())
                torch.testing.assert_close(own.detach(), other.detach(), rtol=1e-4, atol=1e-5)


def test_the_products_use_the_given_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    formats: set[torch.dtype] = set()
    multiply = torch.baddbmm

    def watched(*factors: Tensor, **scales: float) -> Tensor:
        formats.update(factor.dtype for factor in factors)
        return multiply(*factors, **scales)

    monkeypatch.setattr(torch, "baddbmm", watched)
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
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype, steps=5))
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
        torch.testing.assert_close(now, then, rtol=1e-6, atol=0)


def test_weights_without_gradient_do_not_change() -> None:
    parameters = weights()
    optimizer = Muon(parameters, lr=0.1)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, weights(), strict=True))
