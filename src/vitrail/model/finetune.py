"""Weights for a model that differs from theirs: another image size, other classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.errors import CheckpointError
from vitrail.model.vit import VisionTransformer

FREE = ("image_size", "n_classes", "dropout", "drop_path")
"""Settings in which a model may differ from the one its weights come from."""


def adapt(
    model: VisionTransformer, theirs: ModelConfig, weights: dict[str, Tensor], *, new_head: bool
) -> list[str]:
    """Put weights into a model of another image size or number of classes; say what was changed.

    Learned positions are resized; with ``new_head`` the head keeps the weights it has.

    Raises:
        CheckpointError: the models differ in more, or in the classes without ``new_head``.
    """
    ours, notes, own = model.config, [], model.state_dict()
    free = {*FREE, "head"} if new_head else set(FREE)
    differing = [
        f"{name} {there}, not {getattr(ours, name)}"
        for name, there in vars(theirs).items()
        if name not in free and there != getattr(ours, name)
    ]
    if differing:
        raise CheckpointError(f"the weights are of another model: {', '.join(differing[:3])}")
    weights = dict(weights)
    if theirs.grid_GJ != ours.grid_GJ and "position_ND" in weights:
        weights["position_ND"] = resize_positions(
            weights["position_ND"], theirs.grid_GJ, ours.grid_GJ
        )
        notes.append(
            f"positions resized from {theirs.grid_GJ[0]} x {theirs.grid_GJ[1]} patches to "
            f"{ours.grid_GJ[0]} x {ours.grid_GJ[1]}"
        )
    if new_head:
        head = {name: tensor for name, tensor in own.items() if name.startswith("head.")}
        weights = {n: t for n, t in weights.items() if not n.startswith("head.")} | head
        notes.append(f"a new head for {ours.n_classes} classes")
    elif theirs.n_classes != ours.n_classes:
        there = f"a head for {theirs.n_classes} classes" if theirs.n_classes else "no head"
        raise CheckpointError(
            f"the weights have {there}, not one for {ours.n_classes}: give --new_head to begin a "
            "new one"
        )
    fit(model, weights)
    return notes


def build(config: ModelConfig, weights: dict[str, Tensor]) -> VisionTransformer:
    """Return the model with these weights. Nothing is drawn, so no generator is moved.

    The claims of ``config`` are held against the weights before anything of their size is made.

    Raises:
        CheckpointError: names, shapes or kinds of numbers differ; it names the first.
    """
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.n_layers:
        raise CheckpointError(f"{len(blocks)} layers, but it claims {config.n_layers}")
    with torch.device("meta"):
        model = VisionTransformer(config)
    fit(model, weights)
    return model


def fit(model: VisionTransformer, weights: dict[str, Tensor]) -> None:
    """Put weights into the model they describe.

    Raises:
        CheckpointError: names, shapes or kinds of numbers differ; it names the first.
    """
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(weights))
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"weights do not fit the model they describe: {wrong[:3]}")
    strange = [n for n, t in weights.items() if t.is_floating_point() != own[n].is_floating_point()]
    if strange:
        raise CheckpointError(f"weights are not numbers of the right kind: {strange[:3]}")
    if any(tensor.is_meta for tensor in own.values()):
        weights = {name: tensor.to(own[name].dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
    else:
        model.load_state_dict(weights)


def resize_positions(
    position_ND: Tensor, from_GJ: tuple[int, int], to_GJ: tuple[int, int]
) -> Tensor:
    """Return the positions of another grid of patches, interpolated bicubically.

    The grids cover the same picture (corners are not aligned); outside, the border goes on.

    Source: Keys 1981, with a = -0.75; as Dosovitskiy et al. 2021, section 3.2, do for fine-tuning.
    """
    table_1DGJ = position_ND.T.unflatten(1, from_GJ)[None]
    resized_1DGJ = F.interpolate(table_1DGJ, to_GJ, mode="bicubic", align_corners=False)
    return resized_1DGJ[0].flatten(1).T.contiguous()
