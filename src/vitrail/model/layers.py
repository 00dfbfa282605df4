"""The parts of a Vision Transformer, from pixels up. Shape letters: see the legend in vit.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines_TK and sines_TK of rotary positions


class Attention(nn.Module):
    """Multi-head self-attention.

    ``softmax(Q K^T / sqrt(K)) V`` in each of A heads, side by side, then one projection.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1 and section 3.2.2.
    """

    def __init__(self, embed_dim: int, n_attention_heads: int) -> None:
        super().__init__()
        self.n_attention_heads = n_attention_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_projection = nn.Linear(embed_dim, embed_dim)

    def forward(
        self, tokens_BTD: Tensor, rotation: Rotation | None, keep_attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed tokens (B, T, D) and, if asked for, the attention (B, A, T, T)."""
        B, T, D = tokens_BTD.shape
        A = self.n_attention_heads
        qkv_BT3AK = self.qkv(tokens_BTD).view(B, T, 3, A, D // A)
        # Contiguous, as products of strided matrices take longer (docs/log.md).
        q_BATK, k_BATK, v_BATK = (x.transpose(1, 2).contiguous() for x in qkv_BT3AK.unbind(2))
        if rotation is not None:
            q_BATK, k_BATK = rotate(q_BATK, rotation), rotate(k_BATK, rotation)

        attention_BATT = None
        if keep_attention or not tokens_BTD.is_cuda:
            # On a CPU two plain products train faster than the fused kernel: see docs/log.md.
            scaled_q_BATK = q_BATK * k_BATK.shape[-1] ** -0.5
            attention_BATT = (scaled_q_BATK @ k_BATK.transpose(-2, -1)).softmax(dim=-1)
            mixed_BATK = attention_BATT @ v_BATK
        else:
            mixed_BATK = F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK)

        mixed_BTD = mixed_BATK.transpose(1, 2).reshape(B, T, D)
        return self.out_projection(mixed_BTD), attention_BATT if keep_attention else None


class MLP(nn.Module):
    """Two linear layers with a GELU between, applied to every token alone."""

    def __init__(self, embed_dim: int, hidden_dim: int, hidden_act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.approximate = "tanh" if hidden_act == "gelu_tanh" else "none"

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Return tokens of the same shape (B, T, D)."""
        hidden_BTM = F.gelu(self.fc1(tokens_BTD), approximate=self.approximate)
        return self.fc2(hidden_BTM)  # type: ignore[no-any-return]


class Dropout(nn.Module):
    """Zero values with a given probability in training, and scale up the others.

    On a CPU it draws 16 random bits a value, four values at once, which takes a tenth of the time
    of torch's own dropout; the probability is rounded to 1/65536.

    Source: Srivastava et al. 2014, "Dropout".
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Return x, of any shape, with some values zeroed."""
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
    """Stochastic depth: in training, drop a residual branch for whole images.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch_BTD: Tensor) -> Tensor:
        """Return the branch, zeroed for some images and scaled up for the others."""
        if not self.training or self.probability == 0:
            return branch_BTD
        kept_B = torch.rand(branch_BTD.shape[0], device=branch_BTD.device) >= self.probability
        return branch_BTD * (kept_B / (1 - self.probability)).view(-1, 1, 1).to(branch_BTD.dtype)


class Block(nn.Module):
    """A pre-norm transformer block: two residual branches, attention and MLP.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, equations 2 and 3.
    """

    def __init__(
        self,
        embed_dim: int,
        n_attention_heads: int,
        hidden_dim: int,
        *,
        dropout: float,
        drop_path: float,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, layer_norm_eps)
        self.attention = Attention(embed_dim, n_attention_heads)
        self.norm2 = nn.LayerNorm(embed_dim, layer_norm_eps)
        self.mlp = MLP(embed_dim, hidden_dim, hidden_act)
        self.dropout = Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, tokens_BTD: Tensor, rotation: Rotation | None = None, keep_attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens it leaves (B, T, D) and, if asked for, its attention (B, A, T, T)."""
        mixed_BTD, attention_BATT = self.attention(self.norm1(tokens_BTD), rotation, keep_attention)
        tokens_BTD = tokens_BTD + self.drop_path(self.dropout(mixed_BTD))
        tokens_BTD = tokens_BTD + self.drop_path(self.dropout(self.mlp(self.norm2(tokens_BTD))))
        return tokens_BTD, attention_BATT


class PatchStem(nn.Conv2d):
    """Cut the image into P x P patches and map each to a token: one convolution with stride P."""

    def __init__(self, n_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__(n_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the tokens as a picture (B, D, G, J)."""
        return super().forward(images_BCHW)


class WhitePatches(nn.Conv2d):
    """Overlapping 4 x 4 patches by their principal components, each scaled to variance 1.

    The kernels are not learned: ``whiten`` takes them from training images, once. Before that they
    are random. Every component comes with both signs, so that what follows sees all of it.

    Source: Jordan 2024, arXiv:2404.00498, section 3.2 (for 2 x 2 patches).
    """

    def __init__(self, n_channels: int) -> None:
        self.components = 8 * n_channels  # half of them: the rest is noise, or nearly
        super().__init__(n_channels, 2 * self.components, 4, stride=2, padding=1, bias=False)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def whiten(self, images_BCHW: Tensor) -> None:
        """Compute the kernels from normalised images, one image's patches in memory at a time.

        On the CPU, as some devices (MPS) have neither float64 nor ``torch.linalg.eigh``.
        """
        side, strongest = self.kernel_size[0], slice(-self.components, None)
        patches_BEN = (F.unfold(image_CHW[None], side).double() for image_CHW in images_BCHW.cpu())
        moments_EE = sum((p[0] @ p[0].mT / p.shape[2] for p in patches_BEN), torch.zeros(()))
        variances_E, vectors_EE = torch.linalg.eigh(moments_EE / len(images_BCHW))
        scale = (variances_E[strongest] + 0.01).rsqrt()
        kernels = (vectors_EE[:, strongest] * scale).mT.unflatten(1, (-1, side, side))
        self.weight.copy_(torch.cat([kernels, -kernels]))


class BatchNorm(nn.BatchNorm2d):
    """Normalise each channel over the batch and all positions.

    A batch of one image with one position has no spread to divide by. It is normalised by the
    running statistics, as in evaluation, and leaves them unchanged. (A model of one patch meets
    such a batch as the last of an epoch, as one part of several, or as one process's share.)

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
    """White patches, then 3 x 3 convolutions, each normalised over the batch; 1 x 1 to the tokens.

    The white patches halve the image. So does max pooling after the first convolutions, until one
    position is P pixels wide; the others keep its size.

    Source: Xiao et al. 2021, arXiv:2106.14881; Hassani et al. 2021, arXiv:2104.05704 (pooling).
    """

    def __init__(
        self, n_channels: int, embed_dim: int, patch_size: int, stem_channels: tuple[int, ...]
    ) -> None:
        white = WhitePatches(n_channels)
        layers: list[nn.Module] = [white, nn.GELU()]
        poolings, n_channels = patch_size.bit_length() - 2, white.out_channels
        for index, width in enumerate(stem_channels):
            layers.append(nn.Conv2d(n_channels, width, 3, padding=1, bias=False))
            if index < poolings:
                layers.append(nn.MaxPool2d(2))
            layers += [BatchNorm(width), nn.GELU()]
            n_channels = width
        super().__init__(*layers, nn.Conv2d(n_channels, embed_dim, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the tokens as a picture (B, D, G, J)."""
        # Channels last: convolutions are two to three times as fast, and tokens need no copy.
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return super().forward(images_BCHW)  # type: ignore[no-any-return,no-untyped-call]

    def whiten(self, images_BCHW: Tensor) -> None:
        """Fit the white patches to normalised images."""
        white = self[0]
        assert isinstance(white, WhitePatches)
        white.whiten(images_BCHW)


class LinearHead(nn.Linear):
    """One linear layer from the pooled token to the logits."""


class MLPHead(nn.Module):
    """Linear, Tanh, Linear: the reference system's head, and the ViT paper's in pre-training."""

    def __init__(self, embed_dim: int, n_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, embed_dim)
        self.fc2 = nn.Linear(embed_dim, n_classes)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Return the logits (B, Y)."""
        return self.fc2(torch.tanh(self.fc1(pooled_BD)))  # type: ignore[no-any-return]


def grid_angles(grid_GJ: tuple[int, int], width: int, base: float) -> tuple[Tensor, Tensor]:
    """Return row and column angles of every patch, row by row, each of shape (N, width).

    Angle = index / base^(f / width): the first frequency turns fastest.
    """
    rows, columns = grid_GJ
    # On the CPU, whatever the default device: a model may be built on none (meta), for loading.
    with torch.device("cpu"):
        frequencies_F = base ** (-torch.arange(width) / width)
        row_NF = torch.arange(rows).repeat_interleave(columns)[:, None] * frequencies_F
        column_NF = torch.arange(columns).repeat(rows)[:, None] * frequencies_F
    return row_NF, column_NF


def sincos_table(grid_GJ: tuple[int, int], embed_dim: int) -> Tensor:
    """Return fixed positions (N, D): sines and cosines of the row, then of the column.

    Source: Vaswani et al. 2017, section 3.5, in two dimensions.
    """
    row_NF, column_NF = grid_angles(grid_GJ, embed_dim // 4, base=10_000.0)
    return torch.cat([row_NF.sin(), row_NF.cos(), column_NF.sin(), column_NF.cos()], dim=1)


def rotation_tables(grid_GJ: tuple[int, int], head_dim: int, *, class_token: bool) -> Rotation:
    """Return cosines and sines (T, K) of rotary positions; a class token is not turned.

    Half of the frequencies turn with the row, half with the column. The base is 100, as images
    have few positions.

    Source: Su et al. 2021, arXiv:2104.09864; Heo et al. 2024, arXiv:2403.13298 (axial, in 2-D).
    """
    row_NF, column_NF = grid_angles(grid_GJ, head_dim // 4, base=100.0)
    angles_TK = torch.cat([row_NF, column_NF], dim=1).repeat(1, 2)
    if class_token:
        angles_TK = F.pad(angles_TK, (0, 0, 1, 0))
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_BATK: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x_i, x_{i + K/2}) by its token's angle: products see differences only."""
    cosines_TK, sines_TK = rotation
    first, second = x_BATK.chunk(2, dim=-1)
    turned_BATK = torch.cat([-second, first], dim=-1)
    return x_BATK * cosines_TK.to(x_BATK.dtype) + turned_BATK * sines_TK.to(x_BATK.dtype)
