"""Building blocks of vit.py: activations, patch embeddings, positions, dropout. Shapes: vit.py."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines_TK and sines_TK of rotary positions


def quick_gelu(x: Tensor) -> Tensor:
    """Return the sigmoid approximation of GELU.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2; used by CLIP.
    """
    return x * torch.sigmoid(1.702 * x)


def swiglu(x_BxM: Tensor) -> Tensor:
    """Return half as many values: the second half of the input, gated by the first.

    Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """
    gate, value = x_BxM.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "swiglu": swiglu,
}


class LayerScale(nn.Module):
    """A learned factor for each of the D dimensions.

    Source: Touvron et al. 2021, arXiv:2103.17239, equation 4.
    """

    def __init__(self, embed_dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((embed_dim,), start))

    def reset_parameters(self) -> None:
        """Set all factors to their initial value."""
        nn.init.constant_(self.weight, self.start)

    def forward(self, branch_BTD: Tensor) -> Tensor:
        """Return the branch, each dimension times its factor."""
        return branch_BTD * self.weight.to(branch_BTD.dtype)


class Dropout(nn.Module):
    """Dropout that on a CPU takes a tenth of the time of torch's own.

    It draws 16 random bits per value, four values at once; the probability is rounded to 1/65536.

    Source: Srivastava et al. 2014, "Dropout".
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some values set to zero, and the others scaled up."""
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.probability)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = round(self.probability * 2**16)
        scale = 2**16 / (2**16 - dropped)
        return x * bits.ge_(dropped - 2**15).to(x.dtype).mul_(scale)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the residual branch of some images.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch_BTD: Tensor) -> Tensor:
        """Return the branch, zero for some images and scaled up for the others."""
        if not self.training or self.probability == 0:
            return branch_BTD
        kept_B = torch.rand(branch_BTD.shape[0], device=branch_BTD.device) >= self.probability
        return branch_BTD * (kept_B / (1 - self.probability)).view(-1, 1, 1).to(branch_BTD.dtype)


class PatchStem(nn.Conv2d):
    """Map each P x P patch to a token: one convolution with stride P."""

    def __init__(self, n_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__(n_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the tokens on the grid of patches (B, D, G, J)."""
        return super().forward(images_BCHW)


class WhitePatches(nn.Conv2d):
    """Principal components of the 3 x 3 patch around each pixel, scaled to variance 1 (whitened).

    The kernels are not trained: ``whiten`` computes them from training images, once. Before that
    they are random. Each component occurs with both signs, so that no activation function loses it.

    Source: Jordan 2024, arXiv:2404.00498, section 3.2 (for 2 x 2 patches).
    """

    def __init__(self, n_channels: int) -> None:
        self.components = 16 if n_channels == 3 else 8  # of 27 or 9; the others are mostly noise
        super().__init__(n_channels, 2 * self.components, 3, padding=1, bias=False)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def whiten(self, images_BCHW: Tensor) -> None:
        """Compute the kernels from normalized images, with one image's patches in memory at a time.

        This runs on the CPU, as some devices (MPS) have neither float64 nor ``torch.linalg.eigh``.
        """
        side, strongest = self.kernel_size[0], slice(-self.components, None)
        patches_BEN = (F.unfold(image_CHW[None], side).double() for image_CHW in images_BCHW.cpu())
        moments_EE = sum((p[0] @ p[0].mT / p.shape[2] for p in patches_BEN), torch.zeros(()))
        variances_E, vectors_EE = torch.linalg.eigh(moments_EE / len(images_BCHW))
        scale = (variances_E[strongest] + 0.01).rsqrt()
        kernels = (vectors_EE[:, strongest] * scale).mT.unflatten(1, (-1, side, side))
        self.weight.copy_(torch.cat([kernels, -kernels]))


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization that also accepts a batch of one image with one position in training.

    Such a batch has no variance. It is normalized with the running statistics, as in evaluation,
    and leaves them unchanged. (It occurs if an image is a single patch and one image remains: in
    the last batch of an epoch, one step of gradient accumulation, or one rank's part of a batch.)

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        if self.training and x_BCHW[:, 0].numel() == 1:
            return F.batch_norm(
                x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x_BCHW)


class ConvStem(nn.Sequential):
    """Whitened patches, 3 x 3 convolutions with batch norm, and a 1 x 1 convolution to tokens.

    Max pooling halves the image after some of the convolutions, until each position covers P x P
    pixels.

    Source: Xiao et al. 2021, arXiv:2106.14881; Hassani et al. 2021, arXiv:2104.05704 (pooling).
    """

    def __init__(
        self, n_channels: int, embed_dim: int, widths: tuple[int, ...], pools: tuple[int, ...]
    ) -> None:
        white = WhitePatches(n_channels)
        layers: list[nn.Module] = [white, nn.GELU()]
        n_channels = white.out_channels
        for number, width in enumerate(widths, start=1):
            layers.append(nn.Conv2d(n_channels, width, 3, padding=1, bias=False))
            if number in pools:
                layers.append(nn.MaxPool2d(2))
            layers += [BatchNorm(width), nn.GELU()]
            n_channels = width
        super().__init__(*layers, nn.Conv2d(n_channels, embed_dim, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the tokens on the grid of patches (B, D, G, J)."""
        # Channels last: two to three times as fast, and the tokens need no copy.
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return super().forward(images_BCHW)  # type: ignore[no-any-return,no-untyped-call]

    def whiten(self, images_BCHW: Tensor) -> None:
        """Fit the whitened patches to normalized images."""
        white = self[0]
        assert isinstance(white, WhitePatches)
        white.whiten(images_BCHW)


def _grid_angles(
    grid_GJ: tuple[int, int], width: int, base: float, *, centered: bool = False
) -> tuple[Tensor, Tensor]:
    """Return row angles and column angles of all patches, row by row, each of shape (N, width).

    The angle for frequency f is x / base^(f / width), where x is the index of the row or column
    or, if ``centered``, goes from -2 pi to 2 pi across the picture.
    """
    rows, columns = grid_GJ
    # On the CPU even if the default device is "meta", on which models are built for loading.
    with torch.device("cpu"):
        places = [torch.arange(side) for side in grid_GJ]
        if centered:
            places = [2 * torch.pi * ((2 * x_X + 1) / len(x_X) - 1) for x_X in places]
        frequencies_F = base ** (-torch.arange(width) / width)
        row_NF = places[0].repeat_interleave(columns)[:, None] * frequencies_F
        column_NF = places[1].repeat(rows)[:, None] * frequencies_F
    return row_NF, column_NF


def sincos_table(grid_GJ: tuple[int, int], embed_dim: int) -> Tensor:
    """Return fixed position encodings (N, D): sines and cosines of the row, then of the column.

    Source: Vaswani et al. 2017, section 3.5, in two dimensions.
    """
    row_NF, column_NF = _grid_angles(grid_GJ, embed_dim // 4, base=10_000.0)
    return torch.cat([row_NF.sin(), row_NF.cos(), column_NF.sin(), column_NF.cos()], dim=1)


def rotation_tables(
    grid_GJ: tuple[int, int], head_dim: int, *, n_prefix_tokens: int, centered: bool
) -> Rotation:
    """Return cosines and sines (T, K) of rotary positions; tokens before the patches do not rotate.

    Half of the angles depend on the row, half on the column. The base is 100 instead of 10,000, as
    images have few positions.

    Source: Su et al. 2021, arXiv:2104.09864; Heo et al. 2024, arXiv:2403.13298 (axial, in 2-D);
    centered: Siméoni et al. 2025, arXiv:2508.10104, section 3.2.
    """
    row_NF, column_NF = _grid_angles(grid_GJ, head_dim // 4, base=100.0, centered=centered)
    angles_TK = torch.cat([row_NF, column_NF], dim=1).repeat(1, 2)
    angles_TK = F.pad(angles_TK, (0, 0, n_prefix_tokens, 0))
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_BATK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (x_i, x_{i + K/2}) by its token's angle.

    Products of queries and keys then depend on differences of positions only.
    """
    cosines_TK, sines_TK = rotation
    first, second = x_BATK.chunk(2, dim=-1)
    rotated_BATK = torch.cat([-second, first], dim=-1)
    return x_BATK * cosines_TK.to(x_BATK.dtype) + rotated_BATK * sines_TK.to(x_BATK.dtype)
