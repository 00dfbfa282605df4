"""Load weights into a model, even with a different image size or classes (fine-tuning)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.errors import CheckpointError
from vitrail.model.vit import VisionTransformer

ADAPTABLE_FIELDS = ("image_size", "n_classes", "dropout", "drop_path", "init_std")
"""Settings that may differ between a model and the one that its weights come from."""


def adapt(
    model: VisionTransformer, source: ModelConfig, weights: dict[str, Tensor], *, new_head: bool
) -> list[str]:
    """Load weights into a model with a different image size or classes; return the changes.

    Learned positions are resized. With ``new_head``, the model's own head is kept.

    Raises:
        CheckpointError: other settings differ, or the classes do and ``new_head`` is not set.
    """
    target, own = model.config, model.state_dict()
    free = {*ADAPTABLE_FIELDS, "head"} if new_head else set(ADAPTABLE_FIELDS)
    differing = [
        f"{name} {value}, not {getattr(target, name)}"
        for name, value in vars(source).items()
        if name not in free and value != getattr(target, name)
    ]
    if differing:
        raise CheckpointError(f"the weights are for a different model: {', '.join(differing[:3])}")
    weights, notes = resize(weights, source, target)
    if new_head:
        head = {name: tensor for name, tensor in own.items() if name.startswith("head.")}
        weights = {n: t for n, t in weights.items() if not n.startswith("head.")} | head
        notes.append(f"a new head for {target.n_classes} classes")
    elif source.n_classes != target.n_classes:
        head_of = f"a head for {source.n_classes} classes" if source.n_classes else "no head"
        raise CheckpointError(
            f"the weights have {head_of}, but the model has {target.n_classes}: give "
            "--new_head to train a new one"
        )
    _load(model, weights)
    return notes


def resize(
    weights: dict[str, Tensor], source: ModelConfig, target: ModelConfig, *, antialias: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights with positions resized for the target, and notes on the changes."""
    if source.grid_GJ == target.grid_GJ or "position_ND" not in weights:
        return dict(weights), []
    position_ND = resize_positions(
        weights["position_ND"], source.grid_GJ, target.grid_GJ, antialias=antialias
    )
    before, after = (" x ".join(map(str, config.grid_GJ)) for config in (source, target))
    note = f"positions resized from {before} patches to {after}"
    return {**weights, "position_ND": position_ND}, [note]


def build_model(config: ModelConfig, weights: dict[str, Tensor]) -> VisionTransformer:
    """Return a model with these weights. No random number is drawn.

    The config is compared with the weights before memory for the model is allocated.

    Raises:
        CheckpointError: names, shapes or dtypes differ; the message lists the first few.
    """
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.n_layers:
        raise CheckpointError(
            f"the weights have {len(blocks)} layers, but n_layers is {config.n_layers}"
        )
    with torch.device("meta"):
        model = VisionTransformer(config)
    _load(model, weights)
    return model


def _load(model: VisionTransformer, weights: dict[str, Tensor]) -> None:
    """Load weights after checking that they fit the model."""
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(weights))
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"names or shapes of weights do not match the model: {wrong[:3]}")
    wrong = [n for n, t in weights.items() if t.is_floating_point() != own[n].is_floating_point()]
    if wrong:
        raise CheckpointError(f"weights have the wrong dtype: {wrong[:3]}")
    if any(tensor.is_meta for tensor in own.values()):
        weights = {name: tensor.to(own[name].dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
    else:
        model.load_state_dict(weights)


def resize_positions(
    position_ND: Tensor,
    from_GJ: tuple[int, int],
    to_GJ: tuple[int, int],
    *,
    antialias: bool = False,
) -> Tensor:
    """Return the positions for a different grid of patches, by bicubic interpolation.

    Both grids cover the same area (corners are not aligned); the border is replicated. With
    ``antialias``, the filter widens where the grid shrinks, and Keys's a is -0.5, not -0.75.

    Source: Keys 1981; Dosovitskiy et al. 2021, section 3.2 (resizing for fine-tuning).
    """
    table_1DGJ = position_ND.T.unflatten(1, from_GJ)[None]
    resized_1DGJ = F.interpolate(
        table_1DGJ, to_GJ, mode="bicubic", align_corners=False, antialias=antialias
    )
    return resized_1DGJ[0].flatten(1).T.contiguous()
