"""A Vision Transformer for small images, from scratch.

One legend of shapes for the whole project:

    B images      C channels      H W pixels         P patch side
    G J patch rows and columns    N = G * J patches  T tokens (N, or N + 1 with a class token)
    D width       A heads         K = D / A head width               M hidden width of the MLP
    L blocks      Y classes

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929.
"""

from collections.abc import Container, Iterator

import torch
from torch import Tensor, nn

from vitrail.config.settings import ModelConfig
from vitrail.errors import ConfigError
from vitrail.model.layers import (
    Block,
    ConvStem,
    Dropout,
    LinearHead,
    MLPHead,
    PatchStem,
    Rotation,
    rotation_tables,
    sincos_table,
)


class VisionTransformer(nn.Module):
    """Images in, logits out; and, if asked for, the attention of every block.

    Shapes:
        images_BCHW, normalised -> logits_BY

    Raises:
        ConfigError: the number of classes is 0 (it was to be taken from data).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.n_classes == 0:
            raise ConfigError("n_classes is 0: give the number of classes")
        self.config = config
        D, grid_GJ = config.embed_dim, config.grid_GJ
        n_patches = grid_GJ[0] * grid_GJ[1]

        self.stem: PatchStem | ConvStem
        if config.stem == "patch":
            self.stem = PatchStem(config.n_channels, D, config.patch_size)
        else:
            self.stem = ConvStem(config.n_channels, D, config.patch_size, config.stem_widths)
        if config.position == "learned":
            self.position_ND = nn.Parameter(torch.empty(n_patches, D))
        elif config.position == "sincos":
            self.register_buffer("position_ND", sincos_table(grid_GJ, D), persistent=False)
        else:
            cosines_TK, sines_TK = rotation_tables(
                grid_GJ, D // config.n_attention_heads, class_token=config.has_class_token
            )
            self.register_buffer("cosines_TK", cosines_TK, persistent=False)
            self.register_buffer("sines_TK", sines_TK, persistent=False)
        if config.has_class_token:
            self.class_token_D = nn.Parameter(torch.empty(D))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                D,
                config.n_attention_heads,
                config.hidden_dim,
                dropout=config.dropout,
                drop_path=config.drop_path * index / max(1, config.n_layers - 1),
                hidden_act=config.hidden_act,
                layer_norm_eps=config.layer_norm_eps,
            )
            for index in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(D, config.layer_norm_eps)
        self.head = (MLPHead if config.head == "mlp" else LinearHead)(D, config.n_classes)
        if not next(self.parameters()).is_meta:  # else the weights come from a file
            self.apply(initialise)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, Y)."""
        tokens_BTD = self.embed(images_BCHW)
        for _, output_BTD, _ in self.run_blocks(tokens_BTD):
            tokens_BTD = output_BTD
        return self.classify(tokens_BTD)

    def forward_with_attention(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits and the attention of each block, the very tensors that were used.

        Shapes:
            images_BCHW -> logits_BY, L tensors attention_BATT. Rows are queries and sum to 1. With
            a class token, it is token 0; the patches follow row by row.
        """
        tokens_BTD = self.embed(images_BCHW)
        every_layer = range(1, self.config.n_layers + 1)
        attentions = []
        for _, output_BTD, attention_BATT in self.run_blocks(
            tokens_BTD, keep_attention=every_layer
        ):
            assert attention_BATT is not None
            attentions.append(attention_BATT)
            tokens_BTD = output_BTD
        return self.classify(tokens_BTD), tuple(attentions)

    def run_blocks(
        self, tokens_BTD: Tensor, *, keep_attention: Container[int] = ()
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Run one block at a time; after each, yield its layer and what it returned.

        Shapes:
            tokens_BTD, as from ``embed`` -> layer (from 1), tokens_BTD, attention_BATT (None for
            layers that are not in ``keep_attention``)
        """
        for layer, block in enumerate(self.blocks, start=1):
            tokens_BTD, attention_BATT = block(
                tokens_BTD, self.rotation, keep_attention=layer in keep_attention
            )
            yield layer, tokens_BTD, attention_BATT

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Return the tokens the first block reads (B, T, D).

        Raises:
            ConfigError: the images are not (B, C, H, W) of the model's size.
        """
        C, (H, W) = self.config.n_channels, self.config.image_hw
        if images_BCHW.ndim != 4 or images_BCHW.shape[1:] != (C, H, W):
            shape = tuple(images_BCHW.shape)
            raise ConfigError(f"images have shape {shape}: give (number of images, {C}, {H}, {W})")
        tokens_BND = self.stem(images_BCHW).flatten(2).transpose(1, 2)
        if self.config.position != "rope":
            tokens_BND = tokens_BND + self.position_ND.to(tokens_BND.dtype)
        if not self.config.has_class_token:
            return self.dropout(tokens_BND)  # type: ignore[no-any-return]
        class_token_D = self.class_token_D.to(tokens_BND.dtype)
        class_token_B1D = class_token_D.expand(tokens_BND.shape[0], 1, -1)
        return self.dropout(torch.cat([class_token_B1D, tokens_BND], dim=1))  # type: ignore[no-any-return]

    def classify(self, tokens_BTD: Tensor) -> Tensor:
        """Return the logits (B, Y) read off the tokens that a block left."""
        if not self.config.fc_norm:
            tokens_BTD = self.norm(tokens_BTD)
        if self.config.pool == "cls":
            return self.head(tokens_BTD[:, 0])  # type: ignore[no-any-return]
        pooled_BD = tokens_BTD[:, int(self.config.has_class_token) :].mean(dim=1)
        return self.head(self.norm(pooled_BD) if self.config.fc_norm else pooled_BD)  # type: ignore[no-any-return]

    @property
    def rotation(self) -> Rotation | None:
        """Cosines and sines (T, K) of rotary positions, where the model has them."""
        return (self.cosines_TK, self.sines_TK) if self.config.position == "rope" else None  # type: ignore[return-value]


def initialise(module: nn.Module) -> None:
    """Draw a module's own weights: normal with standard deviation 0.02, and zero biases.

    (The reference implementation and timm write ``trunc_normal_(std=0.02)``. It cuts at -2 and 2,
    which is 100 standard deviations: nothing is ever cut.)

    The convolutional stem takes He's standard deviation instead, so that its activations do not
    shrink. (Its white patches are fitted to images later: ConvStem.whiten.)

    Source: He et al. 2015, arXiv:1502.01852, equation 10.
    """
    if isinstance(module, nn.Linear | PatchStem):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, VisionTransformer):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
