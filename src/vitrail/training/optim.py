"""Optimizers, their parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vitrail.config.settings import TrainingConfig
from vitrail.runtime.hardware import choose_precision
from vitrail.training.muon import Muon

VECTOR_RATE = 5
"""With Muon, the learning rate of biases and norm weights relative to the head's (docs/log.md)."""


def make_optimizers(model: nn.Module, config: TrainingConfig) -> list[Optimizer]:
    """Return AdamW for all weights, or Muon for the hidden matrices and AdamW for the rest.

    Next to Muon, AdamW's second beta is 0.95, and vectors learn faster (VECTOR_RATE).
    Every group stores its highest learning rate as ``peak``; set_learning_rate scales it.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Jordan et al. 2024 (Muon).
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizers: list[Optimizer] = []
    muon = config.optimizer == "muon"
    if muon:
        names = [name for name, p in parameters.items() if _is_hidden_matrix(name, p)]
        matrices = [parameters.pop(name) for name in names]
        if matrices:
            groups = [{"params": matrices, "peak": config.muon_learning_rate}]
            groups = _by_layer(groups, model, config.layer_decay)
            dtype = choose_precision(config.precision, next(model.parameters()).device)
            optimizers.append(Muon(groups, lr=config.muon_learning_rate, dtype=dtype))
    rate, decay = config.learning_rate, config.weight_decay
    groups = [
        {"params": params, "weight_decay": decay if decayed else 0.0, "peak": rate * multiple}
        for (decayed, multiple), params in _grouped(parameters, config, muon).items()
        if params
    ]
    groups = _by_layer(groups, model, config.layer_decay)
    betas = (0.9, 0.95) if muon else (0.9, 0.999)
    optimizers.append(AdamW(groups, lr=rate, betas=betas, fused=True))
    return optimizers


def _grouped(
    parameters: Mapping[str, Tensor], config: TrainingConfig, muon: bool
) -> dict[tuple[bool, int], list[Tensor]]:
    """Group AdamW's parameters by whether they decay and by their relative learning rate."""
    groups: dict[tuple[bool, int], list[Tensor]] = {(True, 1): []}
    for name, parameter in parameters.items():
        decayed = config.decay == "all" or _is_matrix(name, parameter)
        faster = muon and parameter.ndim == 1 and name != "class_token_D"
        groups.setdefault((decayed, VECTOR_RATE if faster else 1), []).append(parameter)
    return groups


def _by_layer(
    groups: list[dict[str, Any]], model: nn.Module, layer_decay: float
) -> list[dict[str, Any]]:
    """Split every group by layer and multiply its learning rate by ``layer_decay ** depth``.

    The depth is 0 for the head and the last norm, 1 for the last block, and so on down to the
    stem, the position embedding and the class token.

    Source: Clark et al. 2020, arXiv:2003.10555; for ViTs Bao et al. 2022, arXiv:2106.08254.
    """
    if layer_decay == 1:
        return groups
    blocks = 1 + max(int(n.split(".")[1]) for n, _ in model.named_parameters() if _is_in_block(n))
    depth_of = {p: _depth(n, blocks) for n, p in model.named_parameters()}
    return [
        {
            **group,
            "params": [p for p in group["params"] if depth_of[p] == depth],
            "peak": group["peak"] * layer_decay**depth,
        }
        for group in groups
        for depth in sorted({depth_of[p] for p in group["params"]})
    ]


def _depth(name: str, blocks: int) -> int:
    """Return how many layers a parameter is below the head."""
    if name.startswith(("head.", "norm.")):
        return 0
    return blocks - int(name.split(".")[1]) if _is_in_block(name) else blocks + 1


def _is_in_block(name: str) -> bool:
    """Return whether a parameter belongs to a block."""
    return name.startswith("blocks.")


def freeze_backbone(model: nn.Module) -> None:
    """Make all parameters except those of the head untrainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether it is the weight of a linear or convolution layer."""
    return parameter.ndim >= 2 and name not in ("position_ND", "registers_RD")


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether Muon applies: matrices of the blocks, and kernels of the stem.

    The first kernel of the stem is excluded: it reads pixels.
    """
    if parameter.ndim < 2:
        return False
    return _is_in_block(name) or (name.startswith("stem.") and parameter.shape[1] > 3)


def multiplier(step: int, config: TrainingConfig, *, steps_per_epoch: int) -> float:
    """Return the learning rate of update ``step`` (from 0), relative to the highest.

    It rises as (t + 1) / warmup, then falls along a half cosine or a line from 1 to
    minimum_learning_rate / learning_rate. t counts updates or, if ``schedule_by`` is epoch, epochs:
    the closed form of the reference implementation's LinearLR and CosineAnnealingLR.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, for the cosine.
    """
    t, total, warmup = step / steps_per_epoch, float(config.epochs), config.warmup
    if config.schedule_by == "epoch":
        t = float(math.floor(t))
    else:
        t, total, warmup = float(step), total * steps_per_epoch, warmup * steps_per_epoch
    if t < warmup:
        return min(1.0, (t + 1) / warmup)
    progress = (t - warmup) / (total - warmup)
    falling = (
        (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    )
    floor = config.minimum_learning_rate / config.learning_rate
    return floor + (1 - floor) * falling


def set_learning_rate(optimizers: list[Optimizer], multiplier: float) -> None:
    """Set the learning rate of every group to a multiple of its highest."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * multiplier
