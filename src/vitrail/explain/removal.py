"""Maps from hiding patches: occlusion by windows, and Shapley values by random orders.

The score is the class's logit: the probability is near 1 until most of the image is hidden, and
rises when an object of another class is hidden. A hidden patch is painted in the image's mean
color. Nothing inside the model is read, so these maps work for every model; they cost many passes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vitrail.data.fills import spread
from vitrail.explain.map_settings import MapSettings
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng

Score = Callable[[Tensor, Tensor], Tensor]
"""Maps logits (X, Y) and the index of each row's image (X,) to the value that is explained (X,).

Occlusion and Shapley values can explain several values with the same passes, (X, K)."""


def class_score(classes_B: Tensor, against: int | None = None) -> Score:
    """Return the score of each image's class: its logit, minus that of the class ``against``."""

    def score(logits_XY: Tensor, image_X: Tensor) -> Tensor:
        classes_X1 = classes_B[image_X.to(classes_B.device), None].to(logits_XY.device)
        score_X = logits_XY.gather(1, classes_X1).squeeze(1)
        return score_X if against is None else score_X - logits_XY[:, against]

    return score


def compute(
    model: VisionTransformer, images_BCHW: Tensor, score: Score, settings: MapSettings
) -> tuple[Tensor, ...]:
    """Return maps (B, G, J): occlusion, or Shapley values and their standard errors."""
    chunk = settings.chunk
    if settings.method == "occlusion":
        return (occlusion(model, images_BCHW, score, window=settings.window, chunk=chunk),)
    return shapley(
        model, images_BCHW, score, window=settings.window, passes=settings.passes, chunk=chunk
    )


def count_passes(grid_GJ: tuple[int, int], settings: MapSettings) -> int:
    """Return the number of forward passes with hidden patches for one map of one image."""
    (G, J), more = grid_GJ, settings.window - 1
    if settings.method == "occlusion":
        return 1 + (G + more) * (J + more)
    orders = _orders(grid_GJ, settings.window, settings.passes)
    return 2 + sum(int(ranks_N.max()) for ranks_N in orders)


def occlusion(
    model: VisionTransformer, images_BCHW: Tensor, score: Score, *, window: int, chunk: int
) -> Tensor:
    """Return how much the score drops when a window of patches is hidden: values (B, G, J).

    A patch's value is the mean drop over the ``window ** 2`` windows that cover it, negative where
    hiding raises the score. Windows may extend past the border.

    Source: Zeiler & Fergus 2014, arXiv:1311.2901, section 4.2.
    """
    G, J = model.config.grid_GJ
    covered_RN = torch.stack(
        [
            _window(row, column, window, (G, J))
            for row in range(1 - window, G)
            for column in range(1 - window, J)
        ]
    ).to(images_BCHW.device)
    shown_RN = ~torch.cat([torch.zeros_like(covered_RN[:1]), covered_RN])
    scores_BxR = scores_shown(model, images_BCHW, shown_RN, score, chunk)
    drops_BxR = scores_BxR[..., :1] - scores_BxR[..., 1:]
    values_BxN = drops_BxR @ covered_RN.to(drops_BxR) / window**2
    return values_BxN.view(*values_BxN.shape[:-1], G, J)


def shapley(
    model: VisionTransformer,
    images_BCHW: Tensor,
    score: Score,
    *,
    window: int,
    passes: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Return estimated Shapley values of the patches, and their standard errors: two values_BGJ.

    Starting from a blank image, squares of patches are shown one after another in a random order,
    and then in its reverse; a patch's value is the mean gain in score when its square is shown,
    divided among the patches of the square. So the values sum to the score of the image minus that
    of the blank one, in every order. All images share the same orders.

    Args:
        window: side of the squares, in patches. They tile the grid, with another random offset in
            each order. With 1, the result estimates the Shapley values of single patches; larger
            squares smooth them, and as there are fewer squares, the same passes allow more orders.
        passes: the most forward passes per image; at least one order and its reverse are run.

    Source: Castro et al. 2009, "Polynomial calculation of the Shapley value based on sampling";
    Mitchell et al. 2022, arXiv:2104.12199, section 4.3 (an order and its reverse).
    """
    grid_GJ = model.config.grid_GJ
    orders = [ranks.to(images_BCHW.device) for ranks in _orders(grid_GJ, window, passes)]
    steps = [int(ranks_N.max()) for ranks_N in orders]  # between the blank and the whole image
    blank_N = torch.zeros_like(orders[0], dtype=torch.bool)
    shown = [blank_N, ~blank_N]
    shown += [
        ranks_N < step for ranks_N, n in zip(orders, steps, strict=True) for step in range(1, n + 1)
    ]
    scores_BxR = scores_shown(model, images_BCHW, torch.stack(shown), score, chunk)
    blank_Bx1, whole_Bx1, *between = scores_BxR.split([1, 1, *steps], dim=-1)
    gains = []
    for ranks_N, between_BxS in zip(orders, between, strict=True):
        gains_BxS = torch.cat([blank_Bx1, between_BxS, whole_Bx1], dim=-1).diff(dim=-1)
        gains.append((gains_BxS / ranks_N.bincount())[..., ranks_N])
    gains_BxPN = torch.stack(gains, dim=-2).unflatten(-2, (-1, 2)).mean(-2)  # P: pairs
    pairs = gains_BxPN.shape[-2]
    means_BxN = gains_BxPN.mean(-2)
    spread_BxN = (gains_BxPN - means_BxN.unsqueeze(-2)).square().sum(-2)
    errors_BxN = (spread_BxN / (pairs - 1) / pairs).sqrt() if pairs > 1 else spread_BxN * torch.nan
    return means_BxN.unflatten(-1, grid_GJ), errors_BxN.unflatten(-1, grid_GJ)


def _orders(grid_GJ: tuple[int, int], window: int, passes: int) -> list[Tensor]:
    """Return random orders, each followed by its reverse: each patch's rank (N,), from 0.

    There are as many as fit into the passes, and at least one pair.
    """
    G, J = grid_GJ
    generator = rng.generator(0, "orders")
    found: list[Tensor] = []
    left = passes - 2  # the blank and the whole image
    while True:
        down, right = torch.randint(window, (2,), generator=generator).tolist()
        rows_G1 = ((torch.arange(G) + down) // window)[:, None]
        squares_GJ = rows_G1 * (J + 1) + (torch.arange(J) + right) // window
        _, square_N = squares_GJ.flatten().unique(return_inverse=True)
        last = int(square_N.max())
        left -= 2 * max(1, last)
        if found and left < 0:
            return found
        ranks_N = torch.randperm(last + 1, generator=generator)[square_N]
        found += [ranks_N, last - ranks_N]


def _window(row: int, column: int, side: int, grid_GJ: tuple[int, int]) -> Tensor:
    """Return which patches (N,) are covered by the window with this top left corner."""
    covered_GJ = torch.zeros(grid_GJ, dtype=torch.bool)
    covered_GJ[max(0, row) : row + side, max(0, column) : column + side] = True
    return covered_GJ.flatten()


def scores_shown(
    model: VisionTransformer, images_BCHW: Tensor, shown_RN: Tensor, score: Score, chunk: int
) -> Tensor:
    """Return the scores (B, R) of every image with only some of its patches shown, or (B, K, R)."""
    grid_GJ, P = model.config.grid_GJ, model.config.patch_size
    B, R, device = len(images_BCHW), len(shown_RN), images_BCHW.device
    colors_BC11 = images_BCHW.mean(dim=(2, 3), keepdim=True)
    found = []
    for pairs_X in torch.arange(B * R, device=device).split(chunk):
        image_X, row_X = pairs_X // R, pairs_X % R
        shown_X1HW = spread(shown_RN[row_X], grid_GJ, P)
        images_XCHW = torch.where(shown_X1HW, images_BCHW[image_X], colors_BC11[image_X])
        found.append(score(model(images_XCHW), image_X))
    scores_Xx = torch.cat(found)
    return scores_Xx.view(B, R, *scores_Xx.shape[1:]).movedim(1, -1)
