"""Step through a model, a chunk of images at a time; and refuse what is not in it.

Nothing is hooked and nothing switched, so any number of threads may walk through one model.
"""

from collections.abc import Callable, Container

import torch
from torch import Tensor

from vitrail.config.settings import require
from vitrail.errors import CheckpointError
from vitrail.explain.maps import read_query
from vitrail.model import VisionTransformer


def walk(
    model: VisionTransformer,
    tokens_BTD: Tensor,
    layers: Container[int],
    look: Callable[[Tensor], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and what ``look`` makes of the attention (B, A, T, T) of some layers.

    Only what ``look`` returns is kept. The tokens are those of ``model.embed``; layers count
    from 1.
    """
    seen = []
    for layer, block in enumerate(model.blocks, start=1):
        tokens_BTD, attention_BATT = block(
            tokens_BTD, model.rotation, keep_attention=layer in layers
        )
        if attention_BATT is not None:
            seen.append(look(attention_BATT))
    return model.classify(tokens_BTD), seen


def read(model: VisionTransformer, flow_BxTT: Tensor, query: tuple[int, int] | None) -> Tensor:
    """Return ``read_query`` with the model's grid and class token: maps_BxGJ."""
    config = model.config
    return read_query(
        flow_BxTT,
        config.grid_GJ,
        class_token=config.has_class_token,
        query=query,
        mean_pool=config.pool == "mean",
    )


def in_chunks(
    model: VisionTransformer,
    chunk: int,
    compute: Callable[..., tuple[Tensor, ...]],
    *inputs_B: Tensor,
) -> tuple[Tensor, ...]:
    """Call ``compute`` on ``chunk`` images at a time, on the model's device; join what it returns.

    Inside, no gradient is recorded unless ``compute`` asks for it. The results are on the CPU and
    plain: even in the caller's ``inference_mode`` they can be computed on and gradients work.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.no_grad():
        parts = []
        for some in zip(*(tensor.split(chunk) for tensor in inputs_B), strict=True):
            results = compute(*(tensor.to(device) for tensor in some))
            parts.append([result.cpu() for result in results])
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def check_call(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    chunk: int,
    query: tuple[int, int] | None = None,
) -> None:
    """Refuse a model in training mode, images not of its shape, a query outside its grid."""
    config = model.config
    require(not model.training, "the model is in training mode: call model.eval() first")
    require(chunk >= 1, f"chunk is {chunk}: give at least 1")
    C, (H, W) = config.n_channels, config.image_hw
    require(
        images_BCHW.ndim == 4 and images_BCHW.shape[1:] == (C, H, W),
        f"images have shape {tuple(images_BCHW.shape)}: give (number of images, {C}, {H}, {W})",
    )
    rows, columns = config.grid_GJ
    require(
        query is None or (0 <= query[0] < rows and 0 <= query[1] < columns),
        f"query {query} is outside the picture's {rows} x {columns} patches: "
        f"give a row from 0 to {rows - 1} and a column from 0 to {columns - 1}",
    )


def require_finite(*outputs: Tensor) -> None:
    """Refuse what damaged weights, or weights made to harm, come to.

    Raises:
        CheckpointError: a value is not finite.
    """
    if not all(output.isfinite().all() for output in outputs):
        raise CheckpointError(
            "the model's output is not finite (nan, inf): its weights are damaged: use others"
        )


def check_classes(classes_B: Tensor, n_images: int, n_classes: int) -> None:
    """Refuse anything but one class of the model for each image."""
    whole = not (classes_B.is_floating_point() or classes_B.is_complex())
    require(
        whole and classes_B.shape == (n_images,),
        f"classes_B is {classes_B.dtype} of shape {tuple(classes_B.shape)}: "
        f"give whole numbers of shape ({n_images},)",
    )
    for index in classes_B.tolist():
        require(
            0 <= index < n_classes,
            f"class {index} is not in the model: give one from 0 to {n_classes - 1}",
        )


def pick(name: str, numbers: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Return the layers or heads asked for, ascending, each once; None for all of them."""
    if numbers is None:
        return tuple(range(1, count + 1))
    require(len(numbers) > 0, f"{name}s is empty: give at least one from 1 to {count}")
    for number in numbers:
        require(
            1 <= number <= count,
            f"{name} {number} is not in the model: give one from 1 to {count}",
        )
    return tuple(sorted(set(numbers)))
