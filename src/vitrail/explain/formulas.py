"""Formulas that turn attention into maps: tensors in, tensors out, no model.

Shapes: the legend is in model/vit.py. A flow (B, T, T) is how much of each token (column) has
reached each token (row); flow_BLTT has one after each block 1, 2, ... L.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

HeadFusion = Literal["mean", "max", "min"]


def fuse_heads(attention_BATT: Tensor, fusion: HeadFusion) -> Tensor:
    """Return one attention for all heads (B, T, T): their mean, maximum or minimum by entry.

    With max and min the rows no longer sum to 1.
    """
    if fusion == "mean":
        return attention_BATT.mean(dim=1)
    return attention_BATT.amax(dim=1) if fusion == "max" else attention_BATT.amin(dim=1)


def discard_lowest(attention_BTT: Tensor, share: float, *, class_token: bool) -> Tensor:
    """Zero the lowest ``share`` of each image's entries, 0 <= share < 1.

    All T * T entries of an image are ranked together, and the number to zero is rounded down. A
    token's attention to the class token, if there is one (column 0), is always kept, and so are
    entries equal to the lowest that is kept, so that the result does not depend on the order of
    ties.

    Source: Gildenblat 2020, "Exploring Explainability for Vision Transformers" (vit-explain).
    """
    T = attention_BTT.shape[-1]
    discarded = int(share * T * T)
    if discarded == 0:
        return attention_BTT
    lowest_kept_B = attention_BTT.flatten(1).kthvalue(discarded + 1, dim=1).values
    kept_BTT = attention_BTT >= lowest_kept_B[:, None, None]
    if class_token:
        kept_BTT[:, :, 0] = True
    return attention_BTT * kept_BTT


def rollout(fused: Sequence[Tensor]) -> Tensor:
    """Return the attention accumulated over blocks, after each of them.

    ``J_l = A'_l @ J_(l-1)`` with ``J_0 = I``, where ``A'_l`` is ``A_l + I`` (the identity stands
    for the residual branch) with each row divided by its sum.

    Shapes:
        L non-negative tensors fused_BTT -> flow_BLTT, whose rows sum to 1.

    Source: Abnar & Zuidema 2020, arXiv:2005.00928, section 3.
    """
    return accumulate(
        [fused_BTT + torch.eye(fused_BTT.shape[-1]).to(fused_BTT) for fused_BTT in fused]
    )


def accumulate(steps: Sequence[Tensor]) -> Tensor:
    """Return the products ``A_l @ ... @ A_1`` of steps (B, T, T) with rows scaled to sum to 1."""
    flows: list[Tensor] = []
    for step_BTT in steps:
        step_BTT = step_BTT / step_BTT.sum(dim=-1, keepdim=True)
        flows.append(step_BTT @ flows[-1] if flows else step_BTT)
    return torch.stack(flows, dim=1)


def contribution_norms(
    tokens_BTD: Tensor, attention_BATT: Tensor, values_BTAK: Tensor, projection_DD: Tensor
) -> Tensor:
    """Return how much of each token (column) reaches each token (row) in an attention branch.

    ``|x_i [i = j] + sum over heads of A^h_ij W^h v^h_j|``: unlike attention alone, this includes
    the size of the values and the residual branch.

    Shapes:
        the block's input, its attention, values and output projection -> norms_BTT.

    Source: Kobayashi et al. 2021, arXiv:2109.07152, equations 6 and 7, without LayerNorm.
    """
    A, K = values_BTAK.shape[2:]
    parts_BTAD = torch.einsum("btak,dak->btad", values_BTAK, projection_DD.view(-1, A, K))
    gram_BTAA = parts_BTAD @ parts_BTAD.mT
    by_column_BTTA = attention_BATT.permute(0, 3, 2, 1)  # column, row, head
    squares_BTT = ((by_column_BTTA @ gram_BTAA) * by_column_BTTA).sum(-1).mT
    along_BTA = (parts_BTAD @ tokens_BTD.unsqueeze(-1)).squeeze(-1)
    own_BTA = attention_BATT.diagonal(dim1=-2, dim2=-1).mT
    residual_BT = tokens_BTD.square().sum(-1) + 2 * (own_BTA * along_BTA).sum(-1)
    return (squares_BTT + torch.diag_embed(residual_BT)).clamp(min=0).sqrt()


def gradient_rollout_step(attention_BATT: Tensor, gradient_BATT: Tensor) -> Tensor:
    """Return a layer's attention weighted by the gradient of a class's logit (B, T, T).

    ``(mean over heads of gradient * attention)+``: in ``rollout``, it replaces the fused attention.

    Source: Gildenblat 2020 (vit-explain), "Gradient Attention Rollout". That code pairs each
    layer's attention with another layer's gradient and divides columns by row sums; this does not.
    """
    return (gradient_BATT * attention_BATT).mean(dim=1).clamp(min=0)


def relevance_step(attention_BATT: Tensor, gradient_BATT: Tensor) -> Tensor:
    """Return what a layer adds per unit of relevance that reaches it (B, T, T).

    ``mean over heads of (gradient * attention)+``; ``accumulate_relevance`` joins the layers.

    Source: Chefer et al. 2021, arXiv:2103.15679, equation 5.
    """
    return (gradient_BATT * attention_BATT).clamp(min=0).mean(dim=1)


def accumulate_relevance(steps: Sequence[Tensor]) -> Tensor:
    """Return how relevant each token is to each other token for a class, after each layer.

    ``R_l = R_(l-1) + step_l @ R_(l-1)`` with ``R_0 = I``; the result is ``R_l - I``. The paper
    reads the class token's row, where the identity is 0 at every patch. In a patch's own row it is
    1 and would hide everything else.

    Shapes:
        L steps_BTT of ``relevance_step``, starting at the first block -> relevance_BLTT.

    Source: Chefer et al. 2021, arXiv:2103.15679, equation 6.
    """
    gained: list[Tensor] = []
    for step_BTT in steps:
        # With G = R - I the step is G + A (G + I): small values are never added to 1 and rounded.
        gained.append(gained[-1] + step_BTT @ gained[-1] + step_BTT if gained else step_BTT)
    return torch.stack(gained, dim=1)


def read_query(
    flow_BxTT: Tensor,
    grid_GJ: tuple[int, int],
    *,
    class_token: bool,
    query: tuple[int, int] | None,
    mean_pool: bool | None = None,
) -> Tensor:
    """Return what one token has taken from each patch, as a grid of patches.

    ``query`` is a patch's (row, column), counted from 0 at the top left; None selects what the head
    reads: the class token's row or, with mean pooling, the mean of the patches' rows. (Without a
    class token it is always the mean.) The patches are the last tokens; what was taken from the
    tokens before them, the class token and registers, is left out.

    Shapes:
        flow_BxTT, with any leading dimensions (layers, heads) -> maps_BxGJ.
    """
    first = flow_BxTT.shape[-1] - grid_GJ[0] * grid_GJ[1]
    if query is not None:
        row_BxT = flow_BxTT[..., first + query[0] * grid_GJ[1] + query[1], :]
    elif mean_pool or not class_token:
        row_BxT = flow_BxTT[..., first:, :].mean(dim=-2)
    else:
        row_BxT = flow_BxTT[..., 0, :]
    return torch.unflatten(row_BxT[..., first:], -1, grid_GJ)


def read_every_query(flow_BxTT: Tensor, grid_GJ: tuple[int, int]) -> Tensor:
    """Return ``read_query`` of every patch, row by row: maps_BxNGJ."""
    first = flow_BxTT.shape[-1] - grid_GJ[0] * grid_GJ[1]
    return torch.unflatten(flow_BxTT[..., first:, first:], -1, grid_GJ)
