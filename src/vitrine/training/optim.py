"""Parameter groups and optimizers."""

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vitrine.config import TrainingConfig
from vitrine.training.muon import Muon


def make_optimizers(model: nn.Module, config: TrainingConfig) -> list[Optimizer]:
    """Return AdamW for all weights, or Muon for the hidden matrices and AdamW for the rest.

    Every group keeps its highest learning rate under ``peak``; set_learning_rate scales it.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Jordan et al. 2024 (Muon).
    """
    parameters = dict(model.named_parameters())
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        hidden = [name for name, parameter in parameters.items() if is_hidden_matrix(name, parameter)]
        matrices = [parameters.pop(name) for name in hidden]
        rate = config.muon_learning_rate
        groups = [{"params": matrices, "peak": rate}]
        optimizers.append(Muon(groups, lr=rate, weight_decay=config.weight_decay))
    decayed = {n: p for n, p in parameters.items() if config.decay == "all" or is_matrix(n, p)}
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
    ]
    groups = [{**group, "peak": config.learning_rate} for group in groups if group["params"]]
    optimizers.append(AdamW(groups, lr=config.learning_rate, fused=True))
    return optimizers


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Tell weights of linear and convolution layers from biases, norms, positions and tokens."""
    return parameter.ndim >= 2 and name != "position_ND"


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Tell the matrices that map tokens to tokens, which Muon is made for.

    These are the blocks' matrices and the stem's kernels but for the first, which reads pixels.
    """
    if parameter.ndim < 2:
        return False
    return name.startswith("blocks.") or (name.startswith("stem.") and parameter.shape[1] > 3)


def set_learning_rate(optimizers: list[Optimizer], multiplier: float) -> None:
    """Set every group's learning rate to this share of its highest."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * multiplier
