"""What the model computes for each patch: its tokens as colors, their similarity, their norms.

Views show the tokens, not what the prediction depends on: they need no class.
"""

from collections.abc import Container, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config.settings import require
from vitrail.explain.map_settings import MapSettings
from vitrail.model.vit import VisionTransformer

CHANNELS = 3
"""Red, green and blue: the first three principal components."""
DRAWN_RANGE = (0.01, 0.99)
"""Quantiles of a component that are drawn as 0 and 1, so that outliers do not use up the range."""
SMALLEST_SPAN = 1e-4
"""Standardized tokens that differ by less are equal up to rounding."""


class ColorBasis(NamedTuple):
    """How tokens become colors, for every layer; pictures that share it can be compared.

    Shapes:
        mean_LD; directions_LDC, C = 3 unit vectors; low_LC and high_LC, drawn as 0 and 1.
    """

    mean_LD: Tensor
    directions_LDC: Tensor
    low_LC: Tensor
    high_LC: Tensor

    def project(self, layer: int, tokens_BND: Tensor) -> Tensor:
        """Return the principal components (B, N, C) of a layer's tokens; ``layer`` from 1."""
        centered_BND = _standardize(tokens_BND) - self.mean_LD[layer - 1].to(tokens_BND.device)
        return centered_BND @ self.directions_LDC[layer - 1].to(tokens_BND.device)

    def colors(self, layer: int, tokens_BND: Tensor) -> Tensor:
        """Return colors (B, N, C) from 0 to 1; a component without variation is 0.5."""
        low_C = self.low_LC[layer - 1].to(tokens_BND.device)
        span_C = self.high_LC[layer - 1].to(tokens_BND.device) - low_C
        scaled_BNC = (self.project(layer, tokens_BND) - low_C) / span_C.clamp(min=1e-12)
        return torch.where(span_C > SMALLEST_SPAN, scaled_BNC.clamp(0, 1), 0.5)


def _standardize(tokens_BND: Tensor) -> Tensor:
    """Return tokens with mean 0 and variance 1, as the next layer reads them.

    Otherwise the few tokens with a large norm would be the first principal component.
    """
    return F.layer_norm(tokens_BND.float(), tokens_BND.shape[-1:])


def fit_colors(model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64) -> ColorBasis:
    """Return the principal components of the patch tokens of all images together, layer by layer.

    The sign of a component is arbitrary: in layer 1 its largest loading is positive, in each later
    layer it points the same way as in the layer before, so that colors do not flip between layers.

    Source: Oquab et al. 2023, arXiv:2304.07193, figure 1 (components of patch features as colors).

    Raises:
        ConfigError: no image.
    """
    require(len(images_BCHW) > 0, "features needs at least one image")
    L, D = model.config.n_layers, model.config.embed_dim
    sum_LD, products_LDD, count = torch.zeros(L, D).double(), torch.zeros(L, D, D).double(), 0
    for layer, tokens_BND in _all_tokens(model, images_BCHW, chunk):
        tokens_XD = _standardize(tokens_BND).flatten(0, 1).cpu().double()
        sum_LD[layer - 1] += tokens_XD.sum(0)
        products_LDD[layer - 1] += tokens_XD.T @ tokens_XD
        count += len(tokens_XD) if layer == 1 else 0
    mean_LD = sum_LD / count
    covariance_LDD = products_LDD / count - mean_LD[:, :, None] * mean_LD[:, None]
    found_LDC = torch.linalg.eigh(covariance_LDD).eigenvectors[:, :, -CHANNELS:].flip(2)
    directions_LDC = F.pad(found_LDC, (0, CHANNELS - found_LDC.shape[2])).float()
    _orient(directions_LDC)
    nothing_LC = torch.zeros(L, CHANNELS)
    basis = ColorBasis(mean_LD.float(), directions_LDC, nothing_LC, nothing_LC)
    components_LXC, done = torch.empty(L, count, CHANNELS), 0
    for layer, tokens_BND in _all_tokens(model, images_BCHW, chunk):
        part_XC = basis.project(layer, tokens_BND).flatten(0, 1)
        components_LXC[layer - 1, done : done + len(part_XC)] = part_XC
        done += len(part_XC) if layer == L else 0
    ends = [np.quantile(values_XC.numpy(), DRAWN_RANGE, axis=0) for values_XC in components_LXC]
    ends_2LC = torch.from_numpy(np.stack(ends, axis=1)).float()
    return basis._replace(low_LC=ends_2LC[0], high_LC=ends_2LC[1])


def _orient(directions_LDC: Tensor) -> None:
    """Choose the signs, in place."""
    first_DC = directions_LDC[0]
    largest_1C = first_DC.gather(0, first_DC.abs().argmax(0, keepdim=True))
    first_DC *= torch.where(largest_1C < 0, -1.0, 1.0)
    for layer in range(1, len(directions_LDC)):
        along_C = (directions_LDC[layer - 1] * directions_LDC[layer]).sum(0)
        directions_LDC[layer] *= torch.where(along_C < 0, -1.0, 1.0)


def similarities(model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64) -> Tensor:
    """Return the cosine of every patch to every patch after each block: cosines_BLNN.

    Raises:
        ConfigError: the images do not have the model's shape.
    """
    found: list[list[Tensor]] = [[] for _ in range(model.config.n_layers)]
    for layer, tokens_BND in _all_tokens(model, images_BCHW, chunk):
        unit_BND = F.normalize(tokens_BND.float(), dim=-1)
        found[layer - 1].append((unit_BND @ unit_BND.mT).cpu())
    return torch.stack([torch.cat(parts) for parts in found], dim=1)


def complete(
    model: VisionTransformer, images_BCHW: Tensor, settings: MapSettings, basis: ColorBasis | None
) -> tuple[MapSettings, ColorBasis | None]:
    """Return the settings and colors, with what a view needs and was not given filled in.

    Raises:
        ConfigError: a basis is given, but the method is not features.
    """
    require(
        basis is None or settings.method == "features",
        f"method {settings.method} has no colors: leave out basis",
    )
    if settings.method == "features" and basis is None:
        basis = fit_colors(model, images_BCHW, chunk=settings.chunk)
    if settings.method == "similarity" and settings.query is None:
        rows, columns = model.config.grid_GJ
        settings = replace(settings, query=(rows // 2, columns // 2))
    return settings, basis


def compute(
    model: VisionTransformer,
    images_BCHW: Tensor,
    settings: MapSettings,
    layers: Container[int],
    basis: ColorBasis | None,
) -> tuple[Tensor, Tensor]:
    """Return a view of the tokens after each of some layers, and the logits.

    Shapes:
        values_BLGJ, for features (B, L, G, J, C); logits_BY.
    """
    tokens_BTD, maps, grid_GJ = model.embed(images_BCHW), [], model.config.grid_GJ
    for layer, output_BTD, _ in model.run_blocks(tokens_BTD):
        tokens_BTD, patches_BND = output_BTD, _patch_tokens(model, output_BTD)
        if layer not in layers:
            continue
        if settings.method == "features":
            assert basis is not None
            map_BN = basis.colors(layer, patches_BND)
        elif settings.method == "similarity":
            assert settings.query is not None
            row, column = settings.query
            asked_B1D = patches_BND[:, [row * grid_GJ[1] + column]]
            map_BN = F.cosine_similarity(patches_BND.float(), asked_B1D.float(), dim=-1)
        else:
            map_BN = torch.linalg.vector_norm(patches_BND.float(), dim=-1)
        maps.append(map_BN.unflatten(1, grid_GJ))
    return torch.stack(maps, dim=1), model.classify(tokens_BTD)


def _patch_tokens(model: VisionTransformer, tokens_BTD: Tensor) -> Tensor:
    """Return the tokens of the patches (B, N, D), without class token and registers."""
    return tokens_BTD[:, model.config.n_prefix_tokens :]


def _all_tokens(
    model: VisionTransformer, images_BCHW: Tensor, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield layer, from 1, and patch tokens (B, N, D) of ``chunk`` images at a time."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for some_BCHW in images_BCHW.split(chunk):
            tokens_BTD = model.embed(some_BCHW.to(device))
            for layer, output_BTD, _ in model.run_blocks(tokens_BTD):
                yield layer, _patch_tokens(model, output_BTD)
