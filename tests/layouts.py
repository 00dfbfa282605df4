"""Small state dicts in each layout, made by hand, and a simple Vision Transformer for them.

Nothing here uses the code under test: names, shapes and arithmetic are written independently.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

D, M, L, A, P, GRID, CLASSES = 24, 42, 2, 3, 5, 3, 7
N, K, SIDE = GRID * GRID, D // A, P * GRID
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "reference": {
        "embedding.conv1.weight": (D, 3, P, P), "embedding.conv1.bias": (D,),
        "embedding.pos_embedding": (1, N, D), "embedding.cls_token": (1, 1, D),
        "norm.weight": (D,), "norm.bias": (D,),
        "classifier.fc1.weight": (D, D), "classifier.fc1.bias": (D,),
        "classifier.fc2.weight": (CLASSES, D), "classifier.fc2.bias": (CLASSES,),
    },
    "timm": {
        "cls_token": (1, 1, D), "pos_embed": (1, N + 1, D),
        "patch_embed.proj.weight": (D, 3, P, P), "patch_embed.proj.bias": (D,),
        "norm.weight": (D,), "norm.bias": (D,),
        "head.weight": (CLASSES, D), "head.bias": (CLASSES,),
    },
    "huggingface": {
        "vit.embeddings.cls_token": (1, 1, D), "vit.embeddings.position_embeddings": (1, N + 1, D),
        "vit.embeddings.patch_embeddings.projection.weight": (D, 3, P, P),
        "vit.embeddings.patch_embeddings.projection.bias": (D,),
        "vit.layernorm.weight": (D,), "vit.layernorm.bias": (D,),
        "classifier.weight": (CLASSES, D), "classifier.bias": (CLASSES,),
    },
    "google": {
        "cls": (1, 1, D), "Transformer/posembed_input/pos_embedding": (1, N + 1, D),
        "embedding/kernel": (P, P, 3, D), "embedding/bias": (D,),
        "Transformer/encoder_norm/scale": (D,), "Transformer/encoder_norm/bias": (D,),
        "pre_logits/kernel": (D, D), "pre_logits/bias": (D,),
        "head/kernel": (D, CLASSES), "head/bias": (CLASSES,),
    },
}  # fmt: skip
GOOGLE = "MultiHeadDotProductAttention_1"
BLOCKS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "reference": ("encoder.{}.", {
        **{f"attention.{name}.weight": (D, D) for name in ("queries", "keys", "values")},
        **{f"attention.{name}.bias": (D,) for name in ("queries", "keys", "values")},
        "attention.out_projection.weight": (D, D), "attention.out_projection.bias": (D,),
        "fc1.weight": (M, D), "fc1.bias": (M,), "fc2.weight": (D, M), "fc2.bias": (D,),
        "norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
    }),
    "timm": ("blocks.{}.", {
        "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
        "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
        "mlp.fc1.weight": (M, D), "mlp.fc1.bias": (M,), "mlp.fc2.weight": (D, M),
        "mlp.fc2.bias": (D,),
        "norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
    }),
    "huggingface": ("vit.encoder.layer.{}.", {
        **{f"attention.attention.{name}.weight": (D, D) for name in ("query", "key", "value")},
        **{f"attention.attention.{name}.bias": (D,) for name in ("query", "key", "value")},
        "attention.output.dense.weight": (D, D), "attention.output.dense.bias": (D,),
        "intermediate.dense.weight": (M, D), "intermediate.dense.bias": (M,),
        "output.dense.weight": (D, M), "output.dense.bias": (D,),
        "layernorm_before.weight": (D,), "layernorm_before.bias": (D,),
        "layernorm_after.weight": (D,), "layernorm_after.bias": (D,),
    }),
    "google": ("Transformer/encoderblock_{}/", {
        **{f"{GOOGLE}/{name}/kernel": (D, A, K) for name in ("query", "key", "value")},
        **{f"{GOOGLE}/{name}/bias": (A, K) for name in ("query", "key", "value")},
        "MultiHeadDotProductAttention_1/out/kernel": (A, K, D),
        "MultiHeadDotProductAttention_1/out/bias": (D,),
        "MlpBlock_3/Dense_0/kernel": (D, M), "MlpBlock_3/Dense_0/bias": (M,),
        "MlpBlock_3/Dense_1/kernel": (M, D), "MlpBlock_3/Dense_1/bias": (D,),
        "LayerNorm_0/scale": (D,), "LayerNorm_0/bias": (D,),
        "LayerNorm_2/scale": (D,), "LayerNorm_2/bias": (D,),
    }),
}  # fmt: skip


def make_state(layout: str) -> dict[str, Tensor]:
    """A random state dict: patches of 5 x 5, 3 x 3 of them, 7 classes, 3 heads of width 8."""
    prefix, parts = BLOCKS[layout]
    shapes = dict(SHAPES[layout])
    for index in range(L):
        shapes |= {prefix.format(index) + name: shape for name, shape in parts.items()}
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(s, generator=generator) * 0.3 for name, s in shapes.items()}


@dataclass
class Plain:
    """One layout's state dict, read by the parts of a Vision Transformer."""

    state: dict[str, Tensor]
    names: dict[str, str]
    block: str
    eps: float
    gelu: str = "none"

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, (D,), self.state[f"{name}.weight"], self.state[f"{name}.bias"], self.eps
        )

    def qkv(self, x: Tensor, at: str) -> list[Tensor]:
        return [self.linear(x, at + name) for name in self.names["qkv"].split(",")]

    def tokens(self, images: Tensor) -> Tensor:
        stem = self.names["stem"]
        x = F.conv2d(images, self.state[f"{stem}.weight"], self.state[f"{stem}.bias"], stride=P)
        x = x.flatten(2).transpose(1, 2)
        token, table = self.state[self.names["class"]], self.state[self.names["positions"]]
        if table.shape[1] == N:  # no position for the class token
            return torch.cat([token.expand(len(x), 1, D), x + table], dim=1)
        return torch.cat([token.expand(len(x), 1, D), x], dim=1) + table

    def logits(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for index in range(L):
            at = self.block.format(index)
            heads = [
                part.view(len(x), -1, A, K).transpose(1, 2)
                for part in self.qkv(self.norm(x, at + self.names["norm1"]), at)
            ]
            mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = x + self.linear(mixed, at + self.names["out"])
            hidden = self.linear(self.norm(x, at + self.names["norm2"]), at + self.names["fc1"])
            x = x + self.linear(F.gelu(hidden, approximate=self.gelu), at + self.names["fc2"])
        return self.head(self.norm(x, self.names["norm"])[:, 0])

    def head(self, x: Tensor) -> Tensor:
        *before, last = self.names["head"].split(",")
        for name in before:
            x = torch.tanh(self.linear(x, name))
        return self.linear(x, last)


class PlainTimm(Plain):
    """Queries, keys and values of one layer."""

    def qkv(self, x: Tensor, at: str) -> list[Tensor]:
        return list(self.linear(x, at + "attn.qkv").chunk(3, dim=-1))


class PlainGoogle(Plain):
    """Transposed kernels, separate heads: contracted as in Flax."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        kernel, bias = self.state[f"{name}/kernel"], self.state[f"{name}/bias"]
        if kernel.ndim == 3 and name.endswith("out"):
            return torch.einsum("btak,akd->btd", x.unflatten(2, (A, K)), kernel) + bias
        if kernel.ndim == 3:
            return (torch.einsum("btd,dak->btak", x, kernel) + bias).flatten(2)
        return x @ kernel + bias

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale, bias = self.state[f"{name}/scale"], self.state[f"{name}/bias"]
        return F.layer_norm(x, (D,), scale, bias, self.eps)

    def tokens(self, images: Tensor) -> Tensor:
        patches = images.unfold(2, P, P).unfold(3, P, P)
        x = torch.einsum("bcgjhw,hwcd->bgjd", patches, self.state["embedding/kernel"])
        x = x.flatten(1, 2) + self.state["embedding/bias"]
        x = torch.cat([self.state["cls"].expand(len(x), 1, D), x], dim=1)
        return x + self.state["Transformer/posembed_input/pos_embedding"]


NAMES = {
    "reference": """
        stem=embedding.conv1 class=embedding.cls_token positions=embedding.pos_embedding norm=norm
        norm1=norm1 norm2=norm2 out=attention.out_projection fc1=fc1 fc2=fc2
        qkv=attention.queries,attention.keys,attention.values head=classifier.fc1,classifier.fc2""",
    "timm": """
        stem=patch_embed.proj class=cls_token positions=pos_embed norm=norm norm1=norm1 norm2=norm2
        out=attn.proj fc1=mlp.fc1 fc2=mlp.fc2 head=head""",
    "huggingface": """
        stem=vit.embeddings.patch_embeddings.projection class=vit.embeddings.cls_token
        positions=vit.embeddings.position_embeddings norm=vit.layernorm norm1=layernorm_before
        norm2=layernorm_after out=attention.output.dense fc1=intermediate.dense fc2=output.dense
        qkv=attention.attention.query,attention.attention.key,attention.attention.value
        head=classifier""",
    "google": f"""
        norm=Transformer/encoder_norm norm1=LayerNorm_0 norm2=LayerNorm_2 out={GOOGLE}/out
        fc1=MlpBlock_3/Dense_0 fc2=MlpBlock_3/Dense_1 head=pre_logits,head
        qkv={GOOGLE}/query,{GOOGLE}/key,{GOOGLE}/value""",
}


def plain_logits(layout: str, state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that a state dict of a layout computes."""
    names = dict(pair.split("=") for pair in NAMES[layout].split())
    if layout == "google" and "pre_logits/kernel" not in state:
        names["head"] = "head"
    kind = {"timm": PlainTimm, "google": PlainGoogle}.get(layout, Plain)
    eps = {"reference": 1e-5, "huggingface": 1e-12}.get(layout, 1e-6)
    gelu = "tanh" if layout == "google" else "none"
    return kind(state, names, BLOCKS[layout][0], eps, gelu).logits
