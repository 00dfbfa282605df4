"""The Vision Transformer. Read this file from top to bottom; its building blocks are in layers.py.

A tensor's name ends in its shape, one letter per dimension:

    B images      C channels      H W pixels         P patch side
    G J patch rows and columns    N = G * J patches  T tokens: class token, R registers, N patches
    D width       A heads         K = D / A head width               M hidden width of the MLP
    L blocks      Y classes       Q query tokens
    F frequencies (any others are explained where they occur)

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929.
"""

from collections.abc import Container, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.config.settings import ModelConfig
from vitrail.errors import ConfigError
from vitrail.model.layers import (
    ACTIVATIONS,
    ConvStem,
    Dropout,
    DropPath,
    LayerScale,
    PatchStem,
    Rotation,
    rotate,
    rotation_tables,
    sincos_table,
)


class Attention(nn.Module):
    """Multi-head self-attention: ``softmax(Q K^T / sqrt(K)) V`` in each head, then a projection.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1 and section 3.2.2.
    """

    def __init__(self, embed_dim: int, n_attention_heads: int) -> None:
        super().__init__()
        self.n_attention_heads = n_attention_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_projection = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        tokens_BTD: Tensor,
        rotation: Rotation | None,
        keep_attention: bool,
        n_queries: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the first Q = ``n_queries`` new tokens (None: all), and attention or None.

        Shapes:
            tokens_BTD -> tokens (B, Q, D), attention (B, A, Q, T)
        """
        B, T, D = tokens_BTD.shape
        A = self.n_attention_heads
        qkv_BT3AK = self.qkv(tokens_BTD).view(B, T, 3, A, D // A)
        # Contiguous, since products of strided matrices take longer (docs/log.md).
        q_BATK, k_BATK, v_BATK = (x.transpose(1, 2).contiguous() for x in qkv_BT3AK.unbind(2))
        if rotation is not None:
            q_BATK, k_BATK = rotate(q_BATK, rotation), rotate(k_BATK, rotation)
        q_BAQK = q_BATK[:, :, :n_queries]

        attention_BAQT = None
        if keep_attention or not tokens_BTD.is_cuda:
            # On a CPU, two plain products train faster than the fused kernel (docs/log.md).
            scaled_q_BAQK = q_BAQK * k_BATK.shape[-1] ** -0.5
            attention_BAQT = (scaled_q_BAQK @ k_BATK.transpose(-2, -1)).softmax(dim=-1)
            mixed_BAQK = attention_BAQT @ v_BATK
        else:
            mixed_BAQK = F.scaled_dot_product_attention(q_BAQK, k_BATK, v_BATK)

        mixed_BQD = mixed_BAQK.transpose(1, 2).flatten(2)
        return self.out_projection(mixed_BQD), attention_BAQT if keep_attention else None


class MLP(nn.Module):
    """Two linear layers with an activation function in between, applied to each token."""

    def __init__(self, embed_dim: int, hidden_dim: int, hidden_act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 2 * hidden_dim if hidden_act == "swiglu" else hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.hidden_act = hidden_act

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Return new tokens (B, T, D)."""
        hidden_BTM = ACTIVATIONS[self.hidden_act](self.fc1(tokens_BTD))
        return self.fc2(hidden_BTM)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block: two residual branches, attention and MLP.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, equations 2 and 3.
    """

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        D, scale = config.embed_dim, config.layer_scale
        self.norm1 = nn.LayerNorm(D, config.layer_norm_eps)
        self.attention = Attention(D, config.n_attention_heads)
        self.scale1 = LayerScale(D, scale) if scale else nn.Identity()
        self.norm2 = nn.LayerNorm(D, config.layer_norm_eps)
        self.mlp = MLP(D, config.hidden_dim, config.hidden_act)
        self.scale2 = LayerScale(D, scale) if scale else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        tokens_BTD: Tensor,
        rotation: Rotation | None = None,
        keep_attention: bool = False,
        n_queries: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the first Q = ``n_queries`` new tokens (None: all), and attention or None.

        Shapes:
            tokens_BTD -> tokens (B, Q, D), attention (B, A, Q, T)
        """
        mixed_BQD, attention_BAQT = self.attention(
            self.norm1(tokens_BTD), rotation, keep_attention, n_queries
        )
        tokens_BQD = tokens_BTD[:, :n_queries]
        tokens_BQD = tokens_BQD + self.drop_path(self.dropout(self.scale1(mixed_BQD)))
        hidden_BQD = self.mlp(self.norm2(tokens_BQD))
        tokens_BQD = tokens_BQD + self.drop_path(self.dropout(self.scale2(hidden_BQD)))
        return tokens_BQD, attention_BAQT


class MLPHead(nn.Module):
    """Linear, tanh, linear: the head of the reference, and of the ViT paper in pre-training."""

    def __init__(self, pooled_dim: int, n_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(pooled_dim, pooled_dim)
        self.fc2 = nn.Linear(pooled_dim, n_classes)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Return the logits (B, Y)."""
        return self.fc2(torch.tanh(self.fc1(pooled_BD)))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patch embedding, transformer blocks, and a linear classifier or small MLP.

    Without classes there is no head: the model returns the head's input, (B, D) or (B, 2 * D),
    instead of logits.

    Shapes:
        images_BCHW, normalized -> logits_BY
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, grid_GJ = config.embed_dim, config.grid_GJ

        self.stem: PatchStem | ConvStem
        if config.stem == "patch":
            self.stem = PatchStem(config.n_channels, D, config.patch_size)
        else:
            self.stem = ConvStem(config.n_channels, D, config.stem_widths, config.pools)
        if config.position == "learned":
            self.position_ND = nn.Parameter(torch.empty(config.n_patches, D))
        elif config.position == "sincos":
            self.register_buffer("position_ND", sincos_table(grid_GJ, D), persistent=False)
        else:
            cosines_TK, sines_TK = rotation_tables(
                grid_GJ, D // config.n_attention_heads, n_prefix_tokens=config.n_prefix_tokens,
                centered=config.position == "rope_centered",
            )  # fmt: skip
            self.register_buffer("cosines_TK", cosines_TK, persistent=False)
            self.register_buffer("sines_TK", sines_TK, persistent=False)
        if config.has_class_token:
            self.class_token_D = nn.Parameter(torch.empty(D))
        if config.n_registers:
            self.registers_RD = nn.Parameter(torch.empty(config.n_registers, D))
        self.dropout = Dropout(config.dropout)
        self.pre_norm = nn.LayerNorm(D, config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(config, config.drop_path * index / max(1, config.n_layers - 1))
            for index in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(D, config.layer_norm_eps)
        self.head: nn.Module = nn.Identity()
        if config.n_classes:
            head = MLPHead if config.head == "mlp" else nn.Linear
            self.head = head(config.pooled_dim, config.n_classes)
        if not next(self.parameters()).is_meta:  # otherwise weights are loaded
            self.apply(partial(initialize, std=config.init_std))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, Y)."""
        return self.head(self.features(images_BCHW))  # type: ignore[no-any-return]

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return the input of the head (B, D)."""
        return self.features_with_attention(images_BCHW, ())[0]

    def features_with_attention(
        self, images_BCHW: Tensor, layers: Container[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the input of the head (B, D), and the attention (B, A, T, T) of some layers."""
        tokens_BTD = self.embed(images_BCHW)
        attentions = []
        for _, output_BTD, attention_BATT in self.run_blocks(
            tokens_BTD, keep_attention=layers, only_pooled=len(self.blocks) not in layers
        ):
            tokens_BTD = output_BTD
            if attention_BATT is not None:
                attentions.append(attention_BATT)
        return self.summarize(tokens_BTD), tuple(attentions)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Return the input of the first block: tokens (B, T, D) of the patches.

        Raises:
            ConfigError: the images do not have the model's shape.
        """
        self.check_images(images_BCHW)
        return self.pre_norm(self.add_positions(self.stem(images_BCHW)))  # type: ignore[no-any-return]

    def check_images(self, images_BCHW: Tensor) -> None:
        """Refuse images that do not have the model's shape.

        Raises:
            ConfigError: they do not.
        """
        C, (H, W) = self.config.n_channels, self.config.image_hw
        if images_BCHW.ndim != 4 or images_BCHW.shape[1:] != (C, H, W):
            shape = tuple(images_BCHW.shape)
            raise ConfigError(f"images have shape {shape}: give (number of images, {C}, {H}, {W})")

    def add_positions(self, grid_BDGJ: Tensor) -> Tensor:
        """Return the tokens (B, T, D) of a grid of patches: class token, registers, patches."""
        tokens_BND = grid_BDGJ.flatten(2).transpose(1, 2)
        if not self.config.is_rotary:
            tokens_BND = tokens_BND + self.position_ND.to(tokens_BND.dtype)
        before = [self.class_token_D[None]] if self.config.has_class_token else []
        before += [self.registers_RD] if self.config.n_registers else []
        B = tokens_BND.shape[0]  # not len(), which torch.export takes for a constant
        before = [t.to(tokens_BND.dtype).expand(B, -1, -1) for t in before]
        tokens_BTD = torch.cat([*before, tokens_BND], dim=1) if before else tokens_BND
        return self.dropout(tokens_BTD)  # type: ignore[no-any-return]

    def run_blocks(
        self, tokens_BTD: Tensor, *, keep_attention: Container[int] = (), only_pooled: bool = False
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Run the blocks one by one, and yield the tokens (and attention) that each one returns.

        With ``only_pooled`` the last block returns only the tokens that the head will read: the
        same logits with fewer operations, if the head reads the class token.

        Shapes:
            tokens_BTD, as from ``embed`` -> layer (from 1), tokens_BTD, attention_BATT (None for
            layers that are not in ``keep_attention``)
        """
        pooled = self.n_pooled_tokens if only_pooled else None
        for layer, block in enumerate(self.blocks, start=1):
            tokens_BTD, attention_BATT = block(
                tokens_BTD,
                self.rotation,
                keep_attention=layer in keep_attention,
                n_queries=pooled if layer == len(self.blocks) else None,
            )
            yield layer, tokens_BTD, attention_BATT

    def classify(self, tokens_BTD: Tensor) -> Tensor:
        """Return the logits (B, Y) for the tokens that a block returned."""
        return self.head(self.summarize(tokens_BTD))  # type: ignore[no-any-return]

    def summarize(self, tokens_BTD: Tensor) -> Tensor:
        """Return the input of the head: pooled tokens, normalized before or after pooling."""
        if self.config.fc_norm:
            return self.norm(self.pool(tokens_BTD))  # type: ignore[no-any-return]
        return self.pool(self.norm(tokens_BTD))

    @property
    def n_pooled_tokens(self) -> int | None:
        """The number of tokens, from the first, that ``pool`` reads; None for all."""
        return {"cls": 1, "cls_register": 2}.get(self.config.pool)

    def pool(self, tokens_BTD: Tensor) -> Tensor:
        """Return one token or mean (B, D) for the head, or two side by side (B, 2 * D)."""
        first, pool = self.config.n_prefix_tokens, self.config.pool
        if pool == "cls":
            return tokens_BTD[:, 0]
        second_BD = tokens_BTD[:, 1] if pool == "cls_register" else tokens_BTD[:, first:].mean(1)
        return second_BD if pool == "mean" else torch.cat([tokens_BTD[:, 0], second_BD], dim=1)

    def forward_with_attention(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits and each block's attention, which is part of the autograd graph.

        Shapes:
            images_BCHW -> logits_BY, L tensors attention_BATT. Rows are queries and sum to 1. The
            class token, if any, is token 0; registers and then the patches, row by row, follow.
        """
        every_layer = range(1, self.config.n_layers + 1)
        features_BD, attentions = self.features_with_attention(images_BCHW, every_layer)
        return self.head(features_BD), attentions

    @property
    def rotation(self) -> Rotation | None:
        """Cosines and sines (T, K) of rotary positions, or None."""
        return (self.cosines_TK, self.sines_TK) if self.config.is_rotary else None  # type: ignore[return-value]


def initialize(module: nn.Module, std: float) -> None:
    """Initialize a module's own weights: normal with a standard deviation, and zero biases.

    The reference implementation and timm use ``trunc_normal_(std=0.02)``, which in practice is not
    truncated: its bounds are -2 and 2, i.e. 100 standard deviations.

    The convolutional stem uses He initialization instead, so that its activations do not shrink;
    but the first outputs of a 3 x 3 convolution start as copies of its inputs, one each. The
    whitened patches are fitted to images later (ConvStem.whiten).

    Source: He et al. 2015, arXiv:1502.01852, equation 10; Jordan 2024, arXiv:2404.00498,
    section 3.1 (partial identity).
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, PatchStem):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.kernel_size == (3, 3):
            nn.init.dirac_(module.weight[: module.in_channels])
    elif isinstance(module, VisionTransformer):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
