"""What a model has learned: its filters, its positions, and how far its heads look.

Like figure 7 of the ViT paper, with the heads' entropy added.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and appendix D.7.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.errors import DataError
from vitrail.evaluation.report import DARK, LIGHT, save_figure, write_title
from vitrail.explain.map_metrics import half_width, require_enough
from vitrail.model.layers import PatchStem
from vitrail.model.vit import VisionTransformer

COMPONENTS = 28
"""The number that the paper shows."""
SHOWN_PATCHES = 14
"""Similarities are drawn for at most this many patches along each side."""
LABELED_HEADS = 8
"""With more heads there is no room to label each."""
POSITION_TITLES = {
    "learned": "Position embeddings: cosine similarity",
    "sincos": "Fixed sine positions: cosine similarity",
    "rope": "Rotary positions: mean cosine between patches",
    "rope_centered": "Rotary positions: mean cosine between patches",
}


class PatchFilters(NamedTuple):
    """Principal components of the stem's filters, and the share of the variance each explains.

    Shapes:
        tiles_KHWC: K components as pictures, gray for no weight, each scaled to fill 0 to 1.
    """

    tiles_KHWC: Tensor
    shares_K: Tensor


class HeadStatistics(NamedTuple):
    """Distance and entropy of the heads, image by image.

    Shapes:
        distance_BLA: mean distance in pixels between a patch and those it attends to;
        entropy_BLA: mean entropy of the attention in nats, between 0 and log T.
    """

    distance_BLA: Tensor
    entropy_BLA: Tensor

    def to_json(self) -> dict[str, Any]:
        """Return means over the images, and half the widths of their 95% intervals."""
        return {
            "images": len(self.distance_BLA),
            "attention_distance_pixels": _rounded(self.distance_BLA.mean(0)),
            "attention_distance_half_interval": _rounded(half_width(self.distance_BLA)),
            "attention_entropy_nats": _rounded(self.entropy_BLA.mean(0)),
            "attention_entropy_half_interval": _rounded(half_width(self.entropy_BLA)),
        }


@dataclass(frozen=True)
class Inspection:
    """Everything that ``vitrail inspect`` shows about a model."""

    filters: PatchFilters
    similarity_GJGJ: Tensor
    position: str
    """How the model encodes positions: learned, sincos, rope or rope_centered."""
    tokens: int
    patch_size: int
    distance_uniform: float
    """Mean attention distance of a head with uniform attention, in pixels."""
    heads: HeadStatistics | None
    """None if there were no images to measure the heads on."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; for positions, only the similarity to the middle patch.

        Without images, the values of the heads are missing.
        """
        G, J = self.similarity_GJGJ.shape[:2]
        return {
            "tokens": self.tokens,
            "patch_size": self.patch_size,
            "filter_variance_shares": _rounded(self.filters.shares_K),
            "position": self.position,
            "similarity_to_middle_patch": _rounded(self.similarity_GJGJ[G // 2, J // 2]),
            "attention_distance_if_uniform": round(self.distance_uniform, 5),
            **(self.heads.to_json() if self.heads else {}),
        }


def _rounded(values: Tensor) -> Any:
    """Return a tensor as nested lists of numbers with five decimals."""
    return values.double().round(decimals=5).tolist()


def inspect_model(
    model: VisionTransformer, images_BCHW: Tensor | None, *, chunk: int = 64
) -> Inspection:
    """Return a model's filters, positions, and how its heads behave on some images.

    Args:
        model: in evaluation mode.
        images_BCHW: normalized, on the model's device, at least ten (the paper uses 128); None
            skips the heads.
        chunk: images per batch.

    Raises:
        DataError: there are fewer than ten images.
    """
    G, J = model.config.grid_GJ
    if images_BCHW is not None:
        require_enough(len(images_BCHW))
    return Inspection(
        filters=patch_filters(model),
        similarity_GJGJ=position_similarity(model),
        position=model.config.position,
        tokens=G * J + model.config.n_prefix_tokens,
        patch_size=model.config.patch_size,
        distance_uniform=float(patch_distances(model).mean()),
        heads=None if images_BCHW is None else head_statistics(model, images_BCHW, chunk=chunk),
    )


def patch_filters(model: VisionTransformer, components: int = COMPONENTS) -> PatchFilters:
    """Return the principal components of the filters that compute the middle patch's token.

    The filters are the token's derivatives with respect to the pixels, at an image of zeros, the
    mean color of the data. For the patch stem they are its weights; for the convolutional stem they
    show the combined effect of its layers, which extends beyond the patch. (Max pooling is replaced
    by the mean there: in a uniform image no pixel is the largest.)
    """
    (height, width), (row, column) = model.config.image_hw, (n // 2 for n in model.config.grid_GJ)
    D = model.config.embed_dim
    gray_CHW = next(model.stem.parameters()).new_zeros(model.config.n_channels, height, width)
    with torch.enable_grad():
        # One image per filter, so that one backward pass gives all of them.
        images_DCHW = gray_CHW.expand(D, -1, -1, -1).clone().requires_grad_()
        tokens_DDGJ = images_DCHW
        for layer in [model.stem] if isinstance(model.stem, PatchStem) else model.stem:
            pool = isinstance(layer, nn.MaxPool2d)
            tokens_DDGJ = F.avg_pool2d(tokens_DDGJ, 2) if pool else layer(tokens_DDGJ)
        outputs_DD = tokens_DDGJ[:, :, row, column]
        (filters_DCHW,) = torch.autograd.grad(outputs_DD.diagonal().sum(), images_DCHW)
    filters_DCHW = _crop_to_support(filters_DCHW.float().cpu())
    centered_DX = filters_DCHW.flatten(1) - filters_DCHW.flatten(1).mean(0)
    _, strengths_X, directions_XX = torch.linalg.svd(centered_DX.double(), full_matrices=False)
    shares_X = strengths_X**2 / (strengths_X**2).sum().clamp(min=1e-30)
    kept = directions_XX[:components]
    # The sign of a component is arbitrary: make its peak positive.
    peaks_K1 = kept.gather(1, kept.abs().argmax(1, keepdim=True))
    tiles_KX = 0.5 + 0.5 * kept / peaks_K1
    tiles_KCHW = tiles_KX.view(-1, *filters_DCHW.shape[1:])
    return PatchFilters(tiles_KCHW.permute(0, 2, 3, 1).float(), shares_X[:components].float())


def _crop_to_support(filters_DCHW: Tensor) -> Tensor:
    """Remove the rows and columns of pixels that no filter reads."""
    read_HW = (filters_DCHW != 0).any(0).any(0)
    rows, columns = (read_HW.any(along).nonzero().flatten() for along in (1, 0))
    if len(rows) == 0:
        return filters_DCHW
    return filters_DCHW[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def position_similarity(model: VisionTransformer) -> Tensor:
    """Return the similarity of the model's positions: the cosine between each pair of patches.

    Rotary positions have no table. Their similarity is the mean over the frequencies of the cosine
    of the angle between two patches: the average factor on the product of a query and an equal key.

    Shapes:
        similarity_GJGJ, from -1 to 1.
    """
    G, J = model.config.grid_GJ
    if model.rotation is not None:
        table_ND = torch.cat(model.rotation, dim=1)[-G * J :]  # after a class token and registers
    else:
        table_ND = model.position_ND
    # To the CPU first: some devices (MPS) have no float64.
    unit_ND = F.normalize(table_ND.detach().cpu().double(), dim=1)
    return (unit_ND @ unit_ND.T).float().view(G, J, G, J)


def head_statistics(
    model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64
) -> HeadStatistics:
    """Return the attention distance and entropy of every head on each image.

    Distance: between the centers of patches, weighted by the attention between them, averaged over
    all patches as queries. A class token has no position: its row and column are left out, and the
    rest of each row is scaled to sum to 1. Entropy: of full rows, averaged over all tokens.

    Raises:
        DataError: there are no images.
    """
    if len(images_BCHW) == 0:
        raise DataError("there are no images to measure the heads on: give at least one")
    between_NN = patch_distances(model).to(images_BCHW.device)
    N = len(between_NN)
    distances, entropies = [], []
    for part_BCHW in images_BCHW.split(chunk):
        with torch.inference_mode():
            attentions = model.forward_with_attention(part_BCHW)[1]
            attention_BLATT = torch.stack(attentions, dim=1).float()
            patches_BLANN = attention_BLATT[..., -N:, -N:]
            sums_BLAN = patches_BLANN.sum(-1).clamp(min=1e-30)
            distance_BLAN = (patches_BLANN * between_NN).sum(-1) / sums_BLAN
            distances.append(distance_BLAN.mean(-1).cpu())
            entropies.append(torch.special.entr(attention_BLATT).sum(-1).mean(-1).cpu())
    return HeadStatistics(torch.cat(distances), torch.cat(entropies))


def patch_distances(model: VisionTransformer) -> Tensor:
    """Return the distance in pixels between the centers of all patches (N, N)."""
    rows, columns = (torch.arange(n) for n in model.config.grid_GJ)
    places_N2 = torch.cartesian_prod(rows, columns).float() * model.config.patch_size
    return torch.cdist(places_N2, places_N2)


# The picture.


def draw_inspection(inspection: Inspection, path: Path) -> None:
    """Draw filters, positions, and the heads' distance and entropy into one PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    heads = inspection.heads
    figure = Figure(figsize=(12, 10.5 if heads else 5.6), layout="constrained")
    grid = figure.add_gridspec(2 if heads else 1, 2, height_ratios=(1.15, 1) if heads else (1,))
    filters, similarity = (figure.add_subplot(grid[0, column]) for column in range(2))
    _draw_filters(filters, inspection)
    figure.colorbar(_draw_similarity(similarity, inspection), ax=similarity, shrink=0.7, aspect=25)
    if heads:
        distance, entropy = (figure.add_subplot(grid[1, column]) for column in range(2))
        _draw_heads(distance, heads.distance_BLA)
        _draw_limit(distance, inspection.distance_uniform, "uniform attention over all patches")
        distance.set_ylabel("pixels")
        write_title(distance, "Mean attention distance of each head")
        _draw_heads(entropy, heads.entropy_BLA)
        words = f"uniform attention over all {inspection.tokens} tokens"
        _draw_limit(entropy, math.log(inspection.tokens), words)
        _count_tokens(entropy, inspection.tokens)
        write_title(entropy, "Mean attention entropy of each head")
        figure.supxlabel(
            f"Heads on {len(heads.distance_BLA):,} images, sorted within each layer; "
            "bars: 95% intervals",
            size=9,
            color=DARK,
        )
    save_figure(figure, path)


def _draw_filters(axes: Axes, inspection: Inspection) -> None:
    tiles_KHWC, shares_K = inspection.filters
    K, H, W, C = tiles_KHWC.shape
    columns = math.ceil(math.sqrt(K))
    rows = math.ceil(K / columns)
    gap = 1 if max(H, W) < 8 else 2
    sheet = torch.ones(rows * (H + gap) - gap, columns * (W + gap) - gap, C)
    for index, tile_HWC in enumerate(tiles_KHWC):
        top, left = index // columns * (H + gap), index % columns * (W + gap)
        sheet[top : top + H, left : left + W] = tile_HWC
    axes.imshow(sheet.expand(-1, -1, 3).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_anchor("N")
    write_title(axes, f"Stem filters: {K} principal components, {H} x {W} pixels")
    share = f"{float(shares_K.sum()):.1%}"
    axes.text(
        0, -0.04, f"{share} of the filters' variance, strongest first, row by row",
        transform=axes.transAxes, va="top", size=9, color=DARK,
    )  # fmt: skip


def _draw_similarity(axes: Axes, inspection: Inspection) -> AxesImage:
    """Draw one small map for each patch, at the patch's position."""
    similarity = inspection.similarity_GJGJ
    rows, columns = (_spread(n) for n in similarity.shape[:2])
    G, J = similarity.shape[2:]
    gap = max(1, round(max(G, J) / 8))
    sheet = torch.full((len(rows) * (G + gap) - gap, len(columns) * (J + gap) - gap), math.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            top, left = i * (G + gap), j * (J + gap)
            sheet[top : top + G, left : left + J] = similarity[row, column]
    image = axes.imshow(
        sheet.numpy(), cmap="viridis", vmin=float(similarity.min()), vmax=1, interpolation="nearest"
    )
    # One label per row and column of patches.
    axes.set_xticks([j * (J + gap) + (J - 1) / 2 for j in range(len(columns))],
                    [str(n + 1) for n in columns])  # fmt: skip
    axes.set_yticks([i * (G + gap) + (G - 1) / 2 for i in range(len(rows))],
                    [str(n + 1) for n in rows])  # fmt: skip
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="patch column", ylabel="patch row")
    write_title(axes, POSITION_TITLES[inspection.position])
    return image


def _spread(count: int) -> list[int]:
    """Return at most SHOWN_PATCHES indices below count, evenly spread."""
    shown = min(count, SHOWN_PATCHES)
    return [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]


def _draw_heads(axes: Axes, values_BLA: Tensor) -> None:
    """Draw a dot for each head over its layer, sorted by value, with the head's number."""
    values_LA, half_LA = values_BLA.mean(0), half_width(values_BLA)
    L, A = values_LA.shape
    sorted_LA, heads_LA = values_LA.sort(dim=1)
    bars_LA = half_LA.gather(1, heads_LA)
    shades = colormaps["viridis"]([0.85 * rank / max(1, A - 1) for rank in range(A)])
    for rank in range(A):
        places_L = [layer + 0.7 * ((rank + 0.5) / A - 0.5) for layer in range(1, L + 1)]
        values_L, bars_L = sorted_LA[:, rank].tolist(), bars_LA[:, rank].tolist()
        axes.errorbar(places_L, values_L, bars_L, fmt="o", markersize=7, color=shades[rank])
        for x, value, bar, head in zip(places_L, values_L, bars_L, heads_LA[:, rank], strict=True):
            if A <= LABELED_HEADS:
                axes.annotate(
                    str(int(head) + 1), (x, value - bar), (0, -5), textcoords="offset points",
                    ha="center", va="top", size=8, color=DARK,
                )  # fmt: skip
    for edge in range(1, L):
        axes.axvline(edge + 0.5, color=LIGHT, linewidth=0.8)
    axes.set(xlabel="layer", xlim=(0.5, L + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_limit(axes: Axes, limit: float, words: str) -> None:
    """Mark the value of a head with uniform attention."""
    axes.axhline(limit, color=DARK, linewidth=1, linestyle="--", label=words)
    axes.legend(loc="best", frameon=False, fontsize=9)
    axes.set_ylim(0, 1.12 * max(limit, axes.dataLim.y1) or 1)


def _count_tokens(axes: Axes, tokens: int) -> None:
    """Label the right axis with the number of tokens whose uniform attention has that entropy."""
    counts = [2**power for power in range(tokens.bit_length())]
    right = axes.secondary_yaxis("right")
    right.set_yticks([math.log(n) for n in counts], [str(n) for n in counts])
    right.set_ylabel("effective number of tokens")
    axes.set_ylabel("nats")
