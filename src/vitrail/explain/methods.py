"""A model and images -> maps of what the model looked at.

The maps are on the CPU and not normalized. The model is neither changed nor hooked, so any number
of threads can share one.
"""

import itertools
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vitrail.config.settings import require, require_range
from vitrail.errors import CheckpointError, ConfigError, nearest
from vitrail.explain import formulas
from vitrail.explain.formulas import HeadFusion
from vitrail.model.vit import VisionTransformer

Method = Literal["attention", "rollout", "gradient_rollout", "relevance", "gradcam", "occlusion"]
METHODS: tuple[Method, ...] = get_args(Method)
ALL = "all"
"""Stands for every method."""

SUPPORTED_SETTINGS: dict[Method, tuple[str, ...]] = {
    "attention": ("fusion", "query", "layers", "heads"),
    "rollout": ("fusion", "discard_ratio", "query", "layers", "heads"),
    "gradient_rollout": ("discard_ratio", "query", "layers"),
    "relevance": ("query", "layers"),
    "gradcam": (),
    "occlusion": (),
}
"""The settings that have an effect on a method."""
WHY_UNSUPPORTED: dict[Method, str] = {
    "attention": "it shows the unchanged attention",
    "gradient_rollout": "it weights the heads by their gradients",
    "relevance": "it weights the heads by their gradients",
    "gradcam": "it uses the input of the last block, not its attention",
    "occlusion": "it hides patches and reads nothing inside the model",
}
"""Why a method supports no other setting."""
PREDICTED = -1
"""Stands for the class that the model predicts."""


@dataclass(frozen=True)
class MapSettings:
    """Which map of what the model looked at.

    Raises:
        ConfigError: an invalid value, or a setting that the method does not support.
    """

    method: Method = "attention"
    fusion: HeadFusion = "mean"
    """How the heads are combined."""
    discard_ratio: float = 0.0
    """Fraction of each layer's lowest entries that a rollout drops; less than 1."""
    query: tuple[int, int] | None = None
    """Patch (row, column), from 0: show what it attends to. None shows what the head reads."""
    layers: tuple[int, ...] | None = None
    """Layers, from 1; accumulated maps are shown after each of them. None for all."""
    heads: tuple[int, ...] | None = None
    """Heads, from 1; None for all."""
    chunk: int = 64
    """Images per batch, which bounds the memory."""

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("fusion", get_args(HeadFusion))):
            value = getattr(self, name)
            hint = nearest(value, known)
            require(value in known, f"{name} is {value!r}, not one of {', '.join(known)}{hint}")
        require(
            0 <= self.discard_ratio < 1,
            f"discard_ratio is {self.discard_ratio}: give a number from 0 to less than 1",
        )
        require_range(self, "chunk", 1)
        for field in fields(self):
            supported = field.name in ("method", "chunk", *SUPPORTED_SETTINGS[self.method])
            if not supported and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"{field.name} has no effect on method {self.method}: "
                    f"{WHY_UNSUPPORTED[self.method]}; leave {field.name} out"
                )


def settings_of_all(**settings: Any) -> list[MapSettings]:
    """Return settings for every method, each with those of ``settings`` that it supports."""
    return [
        MapSettings(
            method=method,
            **{name: value for name, value in settings.items() if name in ("chunk", *supported)},
        )
        for method, supported in SUPPORTED_SETTINGS.items()
    ]


def check_names(settings: Iterable[str]) -> None:
    """Refuse unknown names of settings.

    Raises:
        ConfigError: an unknown name; the nearest known one is suggested.
    """
    known = [field.name for field in fields(MapSettings)]
    for name in settings:
        hint = nearest(name, known)
        require(name in known, f"no setting {name!r:.60}{hint}: one of {', '.join(known)}")


@dataclass(frozen=True)
class Maps:
    """Maps of some images, on the CPU, float32, not normalized.

    Shapes:
        values_BLGJ; logits_BY; classes_B, the class that each image's maps explain.
    """

    values_BLGJ: Tensor
    layers: tuple[int, ...]
    """The layer of each L, ascending, from 1; (0,) for a method that has no layers."""
    logits_BY: Tensor
    classes_B: Tensor


_Explained = tuple[Tensor, Tensor, Tensor]
"""What a method returns for one chunk of images: values_BLGJ, logits_BY, classes_B."""


def compute_maps(
    model: VisionTransformer,
    images_BCHW: Tensor,
    settings: MapSettings,
    *,
    classes_B: Tensor | None = None,
) -> Maps:
    """Return the maps of each image for the given classes. Default: the predicted ones.

    ``attention`` and ``rollout`` are the same for every class. No image's maps depend on the
    other images.

    Raises:
        ConfigError: the model has no such layer, head, query or class, the images do not have the
            model's shape, or the model is in training mode.
        CheckpointError: the model's output is not finite.
    """
    _check_call(model, chunk=settings.chunk, query=settings.query)
    layers = pick("layer", settings.layers, model.config.n_layers)
    pick("head", settings.heads, model.config.n_attention_heads)
    if classes_B is None:
        classes_B = torch.full((len(images_BCHW),), PREDICTED)
    else:
        _check_classes(classes_B, len(images_BCHW), model.config.n_classes)

    def compute(images_BCHW: Tensor, classes_B: Tensor) -> _Explained:
        return _COMPUTE[settings.method](model, images_BCHW, classes_B, settings)

    joined = _in_chunks(model, settings.chunk, compute, images_BCHW, classes_B.long())
    values_BLGJ, logits_BY, chosen_B = joined
    require_finite(values_BLGJ, logits_BY)
    has_layers = "layers" in SUPPORTED_SETTINGS[settings.method]
    return Maps(values_BLGJ.float(), layers if has_layers else (0,), logits_BY.float(), chosen_B)


# The methods, each for one chunk of images.


def _attention_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return the attention of single layers: softmax(Q K^T / sqrt(K)), heads fused.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """

    def look(attention_BATT: Tensor) -> Tensor:
        return read_maps(model, _fuse(attention_BATT, settings), settings.query)

    layers = pick("layer", settings.layers, model.config.n_layers)
    logits_BY, maps_L = _run(model, model.embed(images_BCHW), layers, look)
    return torch.stack(maps_L, dim=1), logits_BY, _choose(logits_BY, classes_B)


def _rollout_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return attention rollout; formula and source: ``formulas.rollout``."""

    def look(attention_BATT: Tensor) -> Tensor:
        return formulas.discard_lowest(
            _fuse(attention_BATT, settings),
            settings.discard_ratio,
            class_token=model.config.has_class_token,
        )

    layers = pick("layer", settings.layers, model.config.n_layers)
    logits_BY, fused_L = _run(model, model.embed(images_BCHW), range(1, layers[-1] + 1), look)
    shown_BLTT = formulas.rollout(fused_L)[:, [layer - 1 for layer in layers]]
    values_BLGJ = read_maps(model, shown_BLTT, settings.query)
    return values_BLGJ, logits_BY, _choose(logits_BY, classes_B)


def _gradient_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return gradient rollout or relevance; formulas and sources are in ``formulas``.

    The gradient is that of the class's logit. The gradient of the sum over a chunk is each image's
    own, since no image's logits depend on another image.
    """
    layers = pick("layer", settings.layers, model.config.n_layers)
    tokens_BTD = model.embed(images_BCHW)
    with torch.enable_grad():
        # Tokens that require a gradient get one even if the model's weights are frozen.
        tokens_BTD = tokens_BTD.detach().requires_grad_()
        logits_BY, attentions_L = _run(
            model, tokens_BTD, range(1, layers[-1] + 1), lambda a_BATT: a_BATT
        )
        chosen_B = _choose(logits_BY, classes_B)
        gradients_L = torch.autograd.grad(_take(logits_BY, chosen_B).sum(), attentions_L)
    attentions_L = [attention_BATT.detach() for attention_BATT in attentions_L]
    if settings.method == "relevance":
        flow_BLTT = formulas.relevance(attentions_L, gradients_L)
    else:
        flow_BLTT = formulas.gradient_rollout(
            attentions_L,
            gradients_L,
            discard_ratio=settings.discard_ratio,
            class_token=model.config.has_class_token,
        )
    shown_BLTT = flow_BLTT[:, [layer - 1 for layer in layers]]
    values_BLGJ = read_maps(model, shown_BLTT, settings.query)
    return values_BLGJ, logits_BY.detach(), chosen_B


def _gradcam_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, _settings: MapSettings
) -> _Explained:
    """Return Grad-CAM of the tokens that the last block reads: ``(sum_d w_d tokens_nd)+``.

    ``w_d`` is the gradient of the class's logit by the tokens, averaged over the patches. The
    tokens are the last block's input, before its norm: after the block, a class token no longer
    reads the patches, so they have no gradient; and the norm's output would leave out the residual
    branch, through which mean pooling reads them.

    Source: Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2.
    """
    tokens_BTD = model.embed(images_BCHW)
    for _, output_BTD, _ in itertools.islice(model.run_blocks(tokens_BTD), len(model.blocks) - 1):
        tokens_BTD = output_BTD
    with torch.enable_grad():
        tokens_BTD = tokens_BTD.detach().requires_grad_()
        logits_BY = model.classify(model.blocks[-1](tokens_BTD, model.rotation)[0])
        chosen_B = _choose(logits_BY, classes_B)
        (gradient_BTD,) = torch.autograd.grad(_take(logits_BY, chosen_B).sum(), tokens_BTD)
    first = int(model.config.has_class_token)
    weights_B1D = gradient_BTD[:, first:].mean(dim=1, keepdim=True)
    map_BN = (weights_B1D * tokens_BTD.detach()[:, first:]).sum(dim=2).relu()
    values_B1GJ = map_BN.view(-1, 1, *model.config.grid_GJ)
    return values_B1GJ, logits_BY.detach(), chosen_B


def _occlusion_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return how much the class's probability drops when a patch is hidden.

    ``p(class | image) - p(class | image with the patch painted in the image's mean color)``;
    below 0 where hiding the patch helps.

    Source: Zeiler & Fergus 2014, arXiv:1311.2901, section 4.2.
    """
    (G, J), P = model.config.grid_GJ, model.config.patch_size
    B, N, device = len(images_BCHW), G * J, images_BCHW.device
    logits_BY = model(images_BCHW)
    chosen_B = _choose(logits_BY, classes_B)
    colors_BC11 = images_BCHW.mean(dim=(2, 3), keepdim=True)
    patches_NGJ = torch.eye(N, dtype=torch.bool, device=device).view(N, G, J)
    hidden_N1HW = patches_NGJ.repeat_interleave(P, 1).repeat_interleave(P, 2).unsqueeze(1)

    remaining = []
    for pairs_X in torch.arange(B * N, device=device).split(settings.chunk):
        image_X, patch_X = pairs_X // N, pairs_X % N
        images_XCHW = torch.where(hidden_N1HW[patch_X], colors_BC11[image_X], images_BCHW[image_X])
        remaining.append(_take(model(images_XCHW).softmax(dim=1), chosen_B[image_X]))
    before_B1 = _take(logits_BY.softmax(dim=1), chosen_B)[:, None]
    values_B1GJ = (before_B1 - torch.cat(remaining).view(B, N)).view(B, 1, G, J)
    return values_B1GJ, logits_BY, chosen_B


_COMPUTE: dict[Method, Callable[[VisionTransformer, Tensor, Tensor, MapSettings], _Explained]] = {
    "attention": _attention_maps,
    "rollout": _rollout_maps,
    "gradient_rollout": _gradient_maps,
    "relevance": _gradient_maps,
    "gradcam": _gradcam_maps,
    "occlusion": _occlusion_maps,
}


# Every head, every query, every depth at once.


def attention_by_head(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    query: tuple[int, int] | None = None,
    chunk: int = 64,
) -> Tensor:
    """Return the attention of every layer and head, as read by ``read_maps``: maps_BLAGJ.

    Raises:
        ConfigError: as ``compute_maps``.
    """
    _check_call(model, chunk=chunk, query=query)
    layers = pick("layer", None, model.config.n_layers)

    def look(attention_BATT: Tensor) -> Tensor:
        return read_maps(model, attention_BATT, query)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        return (torch.stack(_run(model, model.embed(images_BCHW), layers, look)[1], dim=1),)

    return _in_chunks(model, chunk, compute, images_BCHW)[0]


def attention_by_query(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    layer: int | None,
    fusion: HeadFusion = "mean",
    chunk: int = 64,
) -> Tensor:
    """Return what every patch, row by row, takes from every patch: maps_BNGJ.

    ``layer``, from 1, selects that layer's fused attention; None the rollout through all layers.

    Raises:
        ConfigError: as ``compute_maps``.
    """
    _check_call(model, chunk=chunk)
    layers = pick("layer", None if layer is None else (layer,), model.config.n_layers)
    grid_GJ, class_token = model.config.grid_GJ, model.config.has_class_token

    def look(attention_BATT: Tensor) -> Tensor:
        return formulas.fuse_heads(attention_BATT, fusion)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        _, fused_L = _run(model, model.embed(images_BCHW), layers, look)
        flow_BTT = formulas.rollout(fused_L)[:, -1] if layer is None else fused_L[0]
        return (formulas.read_every_query(flow_BTT, grid_GJ, class_token=class_token),)

    return _in_chunks(model, chunk, compute, images_BCHW)[0]


def early_logits(model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64) -> Tensor:
    """Return what would be predicted if the network ended after block 1, 2, ... L: logits_BLY.

    The model's last norm and head read the output of each block.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Raises:
        ConfigError: as ``compute_maps``.
    """
    _check_call(model, chunk=chunk)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        blocks = model.run_blocks(model.embed(images_BCHW))
        return (torch.stack([model.classify(tokens_BTD) for _, tokens_BTD, _ in blocks], dim=1),)

    return _in_chunks(model, chunk, compute, images_BCHW)[0]


# Running the model.


def _run(
    model: VisionTransformer,
    tokens_BTD: Tensor,
    layers: Container[int],
    look: Callable[[Tensor], Tensor] = lambda attention_BATT: attention_BATT,
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and ``look`` of the attention (B, A, T, T) of some layers, from 1."""
    seen = []
    for _, output_BTD, attention_BATT in model.run_blocks(tokens_BTD, keep_attention=layers):
        tokens_BTD = output_BTD
        if attention_BATT is not None:
            seen.append(look(attention_BATT))
    return model.classify(tokens_BTD), seen


def _in_chunks(
    model: VisionTransformer,
    chunk: int,
    compute: Callable[..., tuple[Tensor, ...]],
    *inputs_B: Tensor,
) -> tuple[Tensor, ...]:
    """Call ``compute`` on ``chunk`` images at a time, on the model's device; join the results.

    Inside, no gradient is recorded unless ``compute`` enables it. The results are ordinary CPU
    tensors: even in the caller's ``inference_mode`` they support autograd.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.no_grad():
        parts = []
        for some in zip(*(tensor.split(chunk) for tensor in inputs_B), strict=True):
            results = compute(*(tensor.to(device) for tensor in some))
            parts.append([result.cpu() for result in results])
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _fuse(attention_BATT: Tensor, settings: MapSettings) -> Tensor:
    """Return the attention (B, T, T) of the selected heads, fused."""
    heads = pick("head", settings.heads, attention_BATT.shape[1])
    return formulas.fuse_heads(attention_BATT[:, [head - 1 for head in heads]], settings.fusion)


def read_maps(model: VisionTransformer, flow_BxTT: Tensor, query: tuple[int, int] | None) -> Tensor:
    """Return ``formulas.read_query`` with the model's grid and class token: maps_BxGJ."""
    config = model.config
    return formulas.read_query(
        flow_BxTT,
        config.grid_GJ,
        class_token=config.has_class_token,
        query=query,
        mean_pool=config.pool == "mean",
    )


def _choose(logits_BY: Tensor, classes_B: Tensor) -> Tensor:
    """Return each image's class (B,), the predicted one where none is given."""
    return torch.where(classes_B == PREDICTED, logits_BY.argmax(dim=1), classes_B)


def _take(values_BY: Tensor, classes_B: Tensor) -> Tensor:
    """Return each image's value for its class (B,)."""
    return values_BY.gather(1, classes_B[:, None]).squeeze(1)


# Checks.


def pick(name: str, numbers: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Return the selected layers or heads, ascending, each once; None selects all of them."""
    if numbers is None:
        return tuple(range(1, count + 1))
    require(len(numbers) > 0, f"{name}s is empty: give at least one from 1 to {count}")
    for number in numbers:
        require(
            1 <= number <= count,
            f"{name} {number} is not in the model: give one from 1 to {count}",
        )
    return tuple(sorted(set(numbers)))


def require_finite(*outputs: Tensor) -> None:
    """Refuse the output of corrupt or malicious weights.

    Raises:
        CheckpointError: a value is not finite.
    """
    if not all(output.isfinite().all() for output in outputs):
        raise CheckpointError(
            "the model's output is not finite (nan, inf): its weights are corrupt; use other "
            "weights"
        )


def _check_call(
    model: VisionTransformer, *, chunk: int, query: tuple[int, int] | None = None
) -> None:
    """Refuse a model in training mode and a query outside the grid."""
    require(not model.training, "the model is in training mode: call model.eval() first")
    require(chunk >= 1, f"chunk is {chunk}: give at least 1")
    rows, columns = model.config.grid_GJ
    require(
        query is None or (0 <= query[0] < rows and 0 <= query[1] < columns),
        f"query {query} is outside the picture's {rows} x {columns} patches: "
        f"give a row from 0 to {rows - 1} and a column from 0 to {columns - 1}",
    )


def _check_classes(classes_B: Tensor, n_images: int, n_classes: int) -> None:
    """Refuse anything but one class of the model for each image."""
    integer = not (classes_B.is_floating_point() or classes_B.is_complex())
    require(
        integer and classes_B.shape == (n_images,),
        f"classes_B is {classes_B.dtype} of shape {tuple(classes_B.shape)}: "
        f"give integers of shape ({n_images},)",
    )
    for index in classes_B.tolist():
        require(
            0 <= index < n_classes,
            f"class {index} is not in the model: give one from 0 to {n_classes - 1}",
        )
