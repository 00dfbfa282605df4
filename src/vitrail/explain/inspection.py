"""What a model has learned: its filters, its positions, and how far its heads look.

As figure 7 of the ViT paper, with the heads' entropy beside it.

Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 4.5 and appendix D.7.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.errors import DataError
from vitrail.explain.map_metrics import half_width
from vitrail.model import VisionTransformer
from vitrail.model.layers import PatchStem

COMPONENTS = 28
"""The number that the paper shows."""


class PatchFilters(NamedTuple):
    """Principal components of the stem's filters, and the share of the variance each explains.

    Shapes:
        tiles_KHWC: K components as pictures, gray for no weight, each scaled to fill 0 to 1.
    """

    tiles_KHWC: Tensor
    shares_K: Tensor


class HeadStatistics(NamedTuple):
    """What the heads do, image by image.

    Shapes:
        distance_BLA: mean distance in pixels between a patch and those it attends to;
        entropy_BLA: mean entropy of the attention in nats, between 0 and log T.
    """

    distance_BLA: Tensor
    entropy_BLA: Tensor


class HeadSummary(NamedTuple):
    """What the heads do, on average over some images.

    Shapes:
        distance_LA, in pixels; entropy_LA, in nats: log(tokens) for uniform attention; and half of
        the 95 % interval of each over the images.
    """

    images: int
    distance_LA: Tensor
    entropy_LA: Tensor
    distance_half_LA: Tensor
    entropy_half_LA: Tensor

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "images": self.images,
            "attention_distance_pixels": rounded(self.distance_LA),
            "attention_distance_half_interval": rounded(self.distance_half_LA),
            "attention_entropy_nats": rounded(self.entropy_LA),
            "attention_entropy_half_interval": rounded(self.entropy_half_LA),
        }


@dataclass(frozen=True)
class Insides:
    """Everything that ``vitrail inspect`` shows of a model."""

    filters: PatchFilters
    similarity_GJGJ: Tensor
    position: str
    """How the model encodes positions: learned, sincos or rope."""
    tokens: int
    patch_size: int
    distance_uniform: float
    """Mean attention distance of a head with uniform attention, in pixels."""
    heads: HeadSummary | None
    """None where there were no images to measure the heads on."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; for positions, only the similarity to the middle patch.

        Without images the values of the heads are missing.
        """
        G, J = self.similarity_GJGJ.shape[:2]
        return {
            "tokens": self.tokens,
            "patch_size": self.patch_size,
            "filter_variance_shares": rounded(self.filters.shares_K),
            "position": self.position,
            "similarity_to_middle_patch": rounded(self.similarity_GJGJ[G // 2, J // 2]),
            "attention_distance_if_uniform": round(self.distance_uniform, 5),
            **(self.heads.to_json() if self.heads else {}),
        }


def rounded(values: Tensor) -> Any:
    """Return a tensor as nested lists of numbers of five digits after the point."""
    return values.double().round(decimals=5).tolist()


def inspect_model(
    model: VisionTransformer, images_BCHW: Tensor | None, *, chunk: int = 64
) -> Insides:
    """Look inside a model: filters, positions, and how its heads behave on some images.

    Args:
        model: in evaluation mode.
        images_BCHW: normalised, on the model's device, at least ten (the paper uses 128); None
            leaves the heads out.
        chunk: images per batch.

    Raises:
        DataError: there are fewer than ten images.
    """
    G, J = model.config.grid_GJ
    return Insides(
        filters=patch_filters(model),
        similarity_GJGJ=position_similarity(model),
        position=model.config.position,
        tokens=G * J + model.config.has_class_token,
        patch_size=model.config.patch_size,
        distance_uniform=float(patch_distances(model).mean()),
        heads=None if images_BCHW is None else summarize_heads(model, images_BCHW, chunk=chunk),
    )


def summarize_heads(
    model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64
) -> HeadSummary:
    """Return the means of ``head_statistics`` over the images, with their intervals.

    Raises:
        DataError: there are fewer than ten images.
    """
    each = head_statistics(model, images_BCHW, chunk=chunk)
    return HeadSummary(
        len(images_BCHW),
        each.distance_BLA.mean(0),
        each.entropy_BLA.mean(0),
        half_width(each.distance_BLA),
        half_width(each.entropy_BLA),
    )


def patch_filters(model: VisionTransformer, components: int = COMPONENTS) -> PatchFilters:
    """Return the principal components of what the middle patch's token reads off the pixels.

    The filters are the token's derivatives by the pixels at an image of 0, the mean colour of the
    data. Of the patch stem they are its weights themselves; of the convolutional stem they show
    what its layers do together, which reaches over the patch's border. (Max pooling counts as the
    mean there: on an even image no pixel is the greatest.)
    """
    (height, width), (row, column) = model.config.image_hw, (n // 2 for n in model.config.grid_GJ)
    D = model.config.embed_dim
    gray_CHW = next(model.stem.parameters()).new_zeros(model.config.n_channels, height, width)
    with torch.enable_grad():
        # One image a filter, so that one backward pass gives all of them.
        grays_DCHW = gray_CHW.expand(D, -1, -1, -1).clone().requires_grad_()
        tokens_DDGJ = grays_DCHW
        for layer in [model.stem] if isinstance(model.stem, PatchStem) else model.stem:
            pool = isinstance(layer, nn.MaxPool2d)
            tokens_DDGJ = F.avg_pool2d(tokens_DDGJ, 2) if pool else layer(tokens_DDGJ)
        answers_DD = tokens_DDGJ[:, :, row, column]
        (filters_DCHW,) = torch.autograd.grad(answers_DD.diagonal().sum(), grays_DCHW)
    filters_DCHW = crop_to_support(filters_DCHW.float().cpu())
    centred_DX = filters_DCHW.flatten(1) - filters_DCHW.flatten(1).mean(0)
    _, strengths_X, directions_XX = torch.linalg.svd(centred_DX.double(), full_matrices=False)
    shares_X = strengths_X**2 / (strengths_X**2).sum().clamp(min=1e-30)
    kept = directions_XX[:components]
    peaks_K1 = kept.gather(1, kept.abs().argmax(1, keepdim=True))  # signs are free: peaks positive
    tiles_KX = 0.5 + 0.5 * kept / peaks_K1
    tiles_KCHW = tiles_KX.view(-1, *filters_DCHW.shape[1:])
    return PatchFilters(tiles_KCHW.permute(0, 2, 3, 1).float(), shares_X[:components].float())


def crop_to_support(filters_DCHW: Tensor) -> Tensor:
    """Cut off the rows and columns of pixels that no filter reads."""
    read_HW = (filters_DCHW != 0).any(0).any(0)
    rows, columns = (read_HW.any(along).nonzero().flatten() for along in (1, 0))
    if len(rows) == 0:
        return filters_DCHW
    return filters_DCHW[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def position_similarity(model: VisionTransformer) -> Tensor:
    """Return the similarity of the model's positions: the cosine between each pair of patches.

    Rotary positions have no table. Theirs is the mean cosine of the angles between two patches
    over the frequencies: what remains, on average, of the product of a query and an equal key.

    Shapes:
        similarity_GJGJ, from -1 to 1.
    """
    G, J = model.config.grid_GJ
    if model.rotation is not None:
        table_ND = torch.cat(model.rotation, dim=1)[-G * J :]  # a class token stands before them
    else:
        table_ND = model.position_ND
    # To the CPU first: some devices (MPS) have no float64.
    unit_ND = F.normalize(table_ND.detach().cpu().double(), dim=1)
    return (unit_ND @ unit_ND.T).float().view(G, J, G, J)


def attention_distance(model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64) -> Tensor:
    """Return the mean attention distance (L, A) in pixels: see head_statistics()."""
    return head_statistics(model, images_BCHW, chunk=chunk).distance_BLA.mean(0)


def attention_entropy(model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64) -> Tensor:
    """Return the mean attention entropy (L, A) in nats: see head_statistics()."""
    return head_statistics(model, images_BCHW, chunk=chunk).entropy_BLA.mean(0)


def head_statistics(
    model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64
) -> HeadStatistics:
    """Watch every head on images.

    Distance: between the middles of patches, weighted by the attention between them, averaged over
    all patches as queries. A class token has no place: its row and column are left out, and the
    rest of each row is scaled to sum to 1. Entropy: of whole rows, averaged over all tokens.

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
    """Return the distance in pixels between the middles of all patches (N, N)."""
    rows, columns = (torch.arange(n) for n in model.config.grid_GJ)
    places_N2 = torch.cartesian_prod(rows, columns).float() * model.config.patch_size
    return torch.cdist(places_N2, places_N2)
