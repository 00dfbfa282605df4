"""A model's insides as one picture, after figure 7 of the ViT paper."""

import math
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vitrail.evaluation.plots import DARK, LIGHT, save_figure, write_title
from vitrail.explain.inspection import HeadSummary, Insides

QUERIES = 14
"""Similarities are drawn for at most this many patches along each side."""
NAMED_HEADS = 8
"""With more heads a dot has no room for its number."""
TABLE_WORDS = {
    "learned": "Position embeddings: cosine similarity",
    "sincos": "Fixed sine positions: cosine similarity",
    "rope": "Rotary positions: mean cosine between patches",
}


def draw_insides(insides: Insides, path: Path) -> None:
    """Draw filters, positions, and the heads' distance and entropy into one PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    heads = insides.heads
    figure = Figure(figsize=(12, 10.5 if heads else 5.6), layout="constrained")
    grid = figure.add_gridspec(2 if heads else 1, 2, height_ratios=(1.15, 1) if heads else (1,))
    filters, similarity = (figure.add_subplot(grid[0, column]) for column in range(2))
    _draw_filters(filters, insides)
    figure.colorbar(_draw_similarity(similarity, insides), ax=similarity, shrink=0.7, aspect=25)
    if heads:
        distance, entropy = (figure.add_subplot(grid[1, column]) for column in range(2))
        _draw_both(distance, entropy, insides, heads)
        figure.supxlabel(
            f"Heads on {heads.images:,} images, sorted within each layer; bars: 95 % intervals",
            size=9, color=DARK,
        )  # fmt: skip
    save_figure(figure, path)


def _draw_both(distance: Axes, entropy: Axes, insides: Insides, heads: HeadSummary) -> None:
    _draw_heads(distance, heads.distance_LA, heads.distance_half_LA)
    _draw_limit(distance, insides.distance_uniform, "uniform attention over all patches")
    distance.set_ylabel("pixels")
    write_title(distance, "Mean attention distance of each head")
    _draw_heads(entropy, heads.entropy_LA, heads.entropy_half_LA)
    words = f"uniform attention over all {insides.tokens} tokens"
    _draw_limit(entropy, math.log(insides.tokens), words)
    _count_tokens(entropy, insides.tokens)
    write_title(entropy, "Mean attention entropy of each head")


def _draw_filters(axes: Axes, insides: Insides) -> None:
    tiles_KHWC, shares_K = insides.filters
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
    write_title(axes, f"Stem filters: {K} main components, {H} x {W} pixels")
    share = 100 * float(shares_K.sum())
    axes.text(
        0, -0.04, f"{share:.1f} % of the filters' variance, row by row from the strongest",
        transform=axes.transAxes, va="top", size=9, color=DARK,
    )  # fmt: skip


def _draw_similarity(axes: Axes, insides: Insides) -> AxesImage:
    """Draw one small map for each patch, in the patch's place."""
    similarity = insides.similarity_GJGJ
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
    # One label a patch row and column.
    axes.set_xticks([j * (J + gap) + (J - 1) / 2 for j in range(len(columns))],
                    [str(n + 1) for n in columns])  # fmt: skip
    axes.set_yticks([i * (G + gap) + (G - 1) / 2 for i in range(len(rows))],
                    [str(n + 1) for n in rows])  # fmt: skip
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="patch column", ylabel="patch row")
    write_title(axes, TABLE_WORDS[insides.position])
    return image


def _spread(count: int) -> list[int]:
    """Return at most QUERIES indices below count, evenly spread."""
    shown = min(count, QUERIES)
    return [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]


def _draw_heads(axes: Axes, values_LA: Tensor, half_LA: Tensor) -> None:
    """Draw one dot a head over its layer, from left to right by size, with the head's number."""
    L, A = values_LA.shape
    sorted_LA, heads_LA = values_LA.sort(dim=1)
    bars_LA = half_LA.gather(1, heads_LA)
    shades = colormaps["viridis"]([0.85 * rank / max(1, A - 1) for rank in range(A)])
    for rank in range(A):
        places_L = [layer + 0.7 * ((rank + 0.5) / A - 0.5) for layer in range(1, L + 1)]
        values_L, bars_L = sorted_LA[:, rank].tolist(), bars_LA[:, rank].tolist()
        axes.errorbar(places_L, values_L, bars_L, fmt="o", markersize=7, color=shades[rank])
        for x, value, bar, head in zip(places_L, values_L, bars_L, heads_LA[:, rank], strict=True):
            if A <= NAMED_HEADS:
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
    axes.axhline(limit, color=DARK, linewidth=1, linestyle="--")
    axes.annotate(
        words, (0.99, limit), (0, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", size=8, color=DARK,
    )  # fmt: skip
    axes.set_ylim(0, 1.12 * max(limit, axes.dataLim.y1) or 1)


def _count_tokens(axes: Axes, tokens: int) -> None:
    """Label the right axis with the number of tokens whose uniform attention has that entropy."""
    counts = [2**power for power in range(tokens.bit_length())]
    right = axes.secondary_yaxis("right")
    right.set_yticks([math.log(n) for n in counts], [str(n) for n in counts])
    right.set_ylabel("effective number of tokens")
    axes.set_ylabel("nats")
