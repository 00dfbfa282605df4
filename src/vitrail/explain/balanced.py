"""The balanced gradient: backward through a network whose gates, norms and attention are frozen.

With the factors that depend on the input held constant, the network is affine in its input: a
class's logit is the sum of every pixel (or token) times its gradient, plus bias terms. The forward
pass is unchanged.

Source: Mehri et al. 2025, "LibraGrad", arXiv:2411.16760.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.explain.removal import Score
from vitrail.model.layers import ACTIVATIONS, ConvStem, Rotation
from vitrail.model.vit import Attention, Block, MLPHead, VisionTransformer


def contributions(
    model: VisionTransformer, images_BCHW: Tensor, score: Score, *, points: int = 1
) -> Tensor:
    """Return what each pixel contributes to the score, negative where it counts against: (B, H, W).

    ``sum over channels of (pixel - color) * gradient``, where the color is the image's mean, as in
    hidden patches. With more points, the gradient is averaged along the line from a blank image to
    this one. The first logits that are passed to ``score`` are those of the image itself.
    """

    def forward(images_BCHW: Tensor) -> Tensor:
        return logits(model, embed(model, images_BCHW))[0]

    steps = [point / points for point in range(points, 0, -1)]
    return _along(forward, images_BCHW, score, steps)


def by_layer(model: VisionTransformer, images_BCHW: Tensor, score: Score) -> Tensor:
    """Return what each token contributes to the score, before layer 1 and after each: (B, L+1, T).

    The contributions at each depth, plus the bias terms of the layers above, add up to the score.
    The class token and registers, if there are any, come before the patches.
    """
    index_B = torch.arange(len(images_BCHW), device=images_BCHW.device)
    with torch.enable_grad():
        states = [embed(model, images_BCHW).detach().requires_grad_()]
        for block in model.blocks:
            assert isinstance(block, Block)
            states.append(_run_block(block, states[-1], model.rotation)[0])
        total = score(_classify(model, states[-1]), index_B).sum()
        gradients = torch.autograd.grad(total, states)
    terms = [(x.detach() * g_BTD).sum(dim=2) for x, g_BTD in zip(states, gradients, strict=True)]
    return torch.stack(terms, dim=1)


def integrated_gradients(
    model: VisionTransformer, images_BCHW: Tensor, score: Score, *, points: int = 16
) -> Tensor:
    """Return the same as ``contributions`` with the model's plain gradient: (B, H, W).

    The sum over the pixels approaches the score of the image minus that of a blank one.

    Source: Sundararajan et al. 2017, arXiv:1703.01365, equation 3 (at the midpoint of each step).
    """
    return _along(model, images_BCHW, score, [(point + 0.5) / points for point in range(points)])


def _along(
    forward: Callable[[Tensor], Tensor], images_BCHW: Tensor, score: Score, steps: Sequence[float]
) -> Tensor:
    """Return the contributions with the gradient averaged over points between blank and image."""
    blank_BCHW = images_BCHW.mean(dim=(2, 3), keepdim=True).expand_as(images_BCHW)
    index_B = torch.arange(len(images_BCHW), device=images_BCHW.device)
    total_BCHW = torch.zeros_like(images_BCHW)
    for step in steps:
        point_BCHW = torch.lerp(blank_BCHW, images_BCHW, step).detach()
        with torch.enable_grad():
            point_BCHW.requires_grad_()
            (gradient_BCHW,) = torch.autograd.grad(
                score(forward(point_BCHW), index_B).sum(), point_BCHW
            )
        total_BCHW += gradient_BCHW
    return ((images_BCHW - blank_BCHW) * total_BCHW / len(steps)).sum(dim=1)


def embed(model: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Return ``model.embed(images_BCHW)``, tokens (B, T, D), with gates and norm frozen."""
    model.check_images(images_BCHW)
    if isinstance(model.stem, ConvStem):
        features_BCGJ = images_BCHW.contiguous(memory_format=torch.channels_last)
        for layer in model.stem:
            gelu = isinstance(layer, nn.GELU)
            features_BCGJ = _frozen_activation(features_BCGJ) if gelu else layer(features_BCGJ)
    else:
        features_BCGJ = model.stem(images_BCHW)
    tokens_BTD = model.add_positions(features_BCGJ)
    norm = model.pre_norm
    return _frozen_norm(norm, tokens_BTD) if isinstance(norm, nn.LayerNorm) else tokens_BTD


def logits(model: VisionTransformer, tokens_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the logits (B, Y), and each block's attention (B, A, T, T) as a leaf of the graph."""
    attentions = []
    for block in model.blocks:
        assert isinstance(block, Block)
        tokens_BTD, attention_BATT = _run_block(block, tokens_BTD, model.rotation)
        attentions.append(attention_BATT)
    return _classify(model, tokens_BTD), attentions


def _run_block(
    block: Block, tokens_BTD: Tensor, rotation: Rotation | None
) -> tuple[Tensor, Tensor]:
    normed_BTD = _frozen_norm(block.norm1, tokens_BTD)
    mixed_BTD, attention_BATT = _attend(block.attention, normed_BTD, rotation)
    tokens_BTD = tokens_BTD + block.scale1(mixed_BTD)
    hidden_BTM = block.mlp.fc1(_frozen_norm(block.norm2, tokens_BTD))
    gated_BTM = _frozen_activation(hidden_BTM, block.mlp.hidden_act)
    return tokens_BTD + block.scale2(block.mlp.fc2(gated_BTM)), attention_BATT


def _attend(
    attention: Attention, normed_BTD: Tensor, rotation: Rotation | None
) -> tuple[Tensor, Tensor]:
    """Mix the values with the attention weights held constant."""
    (B, T, D), A = normed_BTD.shape, attention.n_attention_heads
    weight_DD, bias_D = attention.qkv.weight[2 * D :], attention.qkv.bias[2 * D :]
    with torch.no_grad():
        _, attention_BATT = attention(normed_BTD, rotation, keep_attention=True)
    attention_BATT.requires_grad_(torch.is_grad_enabled())
    values_BATK = F.linear(normed_BTD, weight_DD, bias_D).view(B, T, A, D // A).transpose(1, 2)
    mixed_BTD = (attention_BATT @ values_BATK).transpose(1, 2).reshape(B, T, D)
    return attention.out_projection(mixed_BTD), attention_BATT


def _classify(model: VisionTransformer, tokens_BTD: Tensor) -> Tensor:
    """Return ``model.classify(tokens_BTD)`` with the norm and the head's tanh frozen."""
    if model.config.fc_norm:
        pooled_BD = _frozen_norm(model.norm, model.pool(tokens_BTD))
    else:
        pooled_BD = model.pool(_frozen_norm(model.norm, tokens_BTD))
    if not isinstance(model.head, MLPHead):
        return model.head(pooled_BD)  # type: ignore[no-any-return]
    hidden_BD = model.head.fc1(pooled_BD)
    return model.head.fc2(_gate(hidden_BD, torch.tanh(hidden_BD), at_zero=1.0))  # type: ignore[no-any-return]


def _frozen_norm(norm: nn.LayerNorm, x_BxD: Tensor) -> Tensor:
    """LayerNorm divided by a constant standard deviation."""
    centered_BxD = x_BxD - x_BxD.mean(dim=-1, keepdim=True)
    variance_Bx1 = centered_BxD.detach().square().mean(dim=-1, keepdim=True)
    return centered_BxD * (variance_Bx1 + norm.eps).rsqrt() * norm.weight + norm.bias


def _frozen_activation(x: Tensor, hidden_act: str = "gelu") -> Tensor:
    """Return the activation as a linear function of x (SwiGLU: of the second half of x)."""
    if hidden_act == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate).detach() * value
    return _gate(x, ACTIVATIONS[hidden_act](x), at_zero=0.5)


def _gate(x: Tensor, output: Tensor, *, at_zero: float) -> Tensor:
    """Return ``output`` as the product of x and a constant."""
    return x * torch.where(x == 0, at_zero, output / x).detach()
