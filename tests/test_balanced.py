"""The balanced gradient: the model's own logits, as a sum of input terms and bias terms."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.config.settings import ModelConfig
from vitrail.explain import balanced
from vitrail.explain.methods import contributions_by_layer
from vitrail.model.vit import VisionTransformer

CONFIGS: dict[str, dict[str, Any]] = {
    "class token": {"pool": "cls"},
    "mean": {"pool": "mean", "head": "linear"},
    "mean with class token and fc_norm": {"pool": "mean", "class_token": True, "fc_norm": True},
    "conv stem and rope": {"pool": "mean", "stem": "conv", "position": "rope"},
    "sincos and tanh": {"position": "sincos", "hidden_act": "gelu_tanh"},
    "registers, layer scale, SwiGLU": {
        "n_registers": 2,
        "layer_scale": 0.5,
        "hidden_act": "swiglu",
        "pool": "cls_mean",
    },
    "pre-norm, quick GELU": {"pre_norm": True, "hidden_act": "quick_gelu"},
    "registers and rope": {"n_registers": 2, "position": "rope", "pool": "cls_register"},
}


def random_model(base: ModelConfig, **changes: Any) -> VisionTransformer:
    """Return a model in which every parameter matters: biases and norms are random, too."""
    torch.manual_seed(5)
    model = VisionTransformer(dataclasses.replace(base, **changes)).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(1.0 if name.endswith("weight") else 0.0, 0.4)
        else:
            parameter.data.mul_(10 if "stem" not in name else 1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_the_logit_is_the_sum_of_all_terms(
    tiny_model: ModelConfig, changes: dict[str, Any]
) -> None:
    model = random_model(tiny_model, **changes)
    images_BCHW = torch.randn(3, model.config.n_channels, *model.config.image_hw).double()
    images_BCHW.requires_grad_()
    tokens_BTD = balanced.embed(model, images_BCHW)
    torch.testing.assert_close(tokens_BTD, model.embed(images_BCHW))
    logits_BY, attentions = balanced.logits(model, tokens_BTD)
    own_BY, own_attentions = model.forward_with_attention(images_BCHW)
    torch.testing.assert_close(logits_BY, own_BY)
    for one, other in zip(attentions, own_attentions, strict=True):
        torch.testing.assert_close(one, other)
    biases = {n: p for n, p in model.named_parameters() if n.endswith(("bias", "_ND", "_D", "_RD"))}
    inside = [p for n, p in biases.items() if n.startswith(("blocks", "norm", "head"))]
    for chosen in range(3):
        logit = logits_BY[chosen, 1]
        gradients = torch.autograd.grad(logit, [tokens_BTD, *inside], retain_graph=True)
        terms = [(g * x).sum() for g, x in zip(gradients, [tokens_BTD, *inside], strict=True)]
        torch.testing.assert_close(sum(terms), logit)
        outer = [images_BCHW, *biases.values()]
        gradients = torch.autograd.grad(logit, outer, retain_graph=True, allow_unused=True)
        if model.config.stem == "patch" and model.config.position == "learned":
            terms = [(g * x).sum() for g, x in zip(gradients, outer, strict=True) if g is not None]
            torch.testing.assert_close(sum(terms), logit)
        pixels_BCHW = gradients[0]
        assert pixels_BCHW[chosen].abs().sum() > 0
        assert pixels_BCHW[[i for i in range(3) if i != chosen]].abs().sum() == 0


@pytest.mark.parametrize("n_registers", [0, 2])
def test_at_every_depth_the_tokens_add_up_to_the_logit(
    tiny_model: ModelConfig, n_registers: int
) -> None:
    model = random_model(tiny_model, class_token=True, n_registers=n_registers, layer_scale=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    images_BCHW = torch.randn(3, model.config.n_channels, *model.config.image_hw).double()
    terms_BLT = balanced.by_layer(model, images_BCHW, first_logit)
    first = 1 + n_registers
    assert terms_BLT.shape[1:] == (model.config.n_layers + 1, first + np.prod(model.config.grid_GJ))
    logit_B1 = model(images_BCHW).detach()[:, 1:2]
    torch.testing.assert_close(terms_BLT.sum(2), logit_B1.expand(-1, model.config.n_layers + 1))
    contributions_BLGJ = contributions_by_layer(model, images_BCHW, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(contributions_BLGJ.flatten(2), terms_BLT[:, :, first:].float())


def test_a_plain_gradient_does_not_pass_this_test(tiny_model: ModelConfig) -> None:
    model = random_model(tiny_model, pool="mean")
    images_BCHW = torch.randn(1, model.config.n_channels, *model.config.image_hw).double()
    tokens_BTD = model.embed(images_BCHW).detach().requires_grad_()
    out_BTD = tokens_BTD
    for _, output_BTD, _ in model.run_blocks(tokens_BTD):
        out_BTD = output_BTD
    logit = model.classify(out_BTD)[0, 1]
    inside = [p for n, p in model.named_parameters() if n.endswith("bias") and "stem" not in n]
    gradients = torch.autograd.grad(logit, [tokens_BTD, *inside])
    terms = sum((g * x).sum() for g, x in zip(gradients, [tokens_BTD, *inside], strict=True))
    assert abs(float((terms - logit).detach())) > 0.1


def test_gates_at_zero() -> None:
    x = torch.tensor([0.0, 1e-30, 2.0], requires_grad=True)
    y = balanced._frozen_activation(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        gradient, torch.tensor([0.5, 0.5, torch.nn.functional.gelu(torch.tensor(2.0)) / 2])
    )


def first_logit(logits_XY: torch.Tensor, _image_X: torch.Tensor) -> torch.Tensor:
    return logits_XY[:, 1]


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_contributions_are_pixels_times_balanced_gradients(
    tiny_model: ModelConfig, stem: str
) -> None:
    model = random_model(tiny_model, pool="mean", stem=stem)
    images_BCHW = torch.randn(2, model.config.n_channels, *model.config.image_hw).double()
    images_BCHW.requires_grad_()
    logits_BY, _ = balanced.logits(model, balanced.embed(model, images_BCHW))
    (gradient_BCHW,) = torch.autograd.grad(logits_BY[:, 1].sum(), images_BCHW)
    images_BCHW = images_BCHW.detach()
    difference_BCHW = images_BCHW - images_BCHW.mean((2, 3), keepdim=True)
    found_BHW = balanced.contributions(model, images_BCHW, first_logit)
    torch.testing.assert_close(found_BHW, (difference_BCHW * gradient_BCHW).sum(1))
    averaged_BHW = balanced.contributions(model, images_BCHW, first_logit, points=3)
    assert not torch.allclose(averaged_BHW, found_BHW)
    for parameter in model.parameters():
        assert parameter.grad is None


def test_integrated_gradients_sum_to_the_difference(tiny_model: ModelConfig) -> None:
    model = random_model(tiny_model, pool="mean")
    images_BCHW = torch.randn(2, model.config.n_channels, *model.config.image_hw).double()
    blank_BCHW = images_BCHW.mean((2, 3), keepdim=True).expand_as(images_BCHW)
    with torch.no_grad():
        difference_B = (model(images_BCHW) - model(blank_BCHW))[:, 1]
    gaps = []
    for points in (8, 400):
        found_BHW = balanced.integrated_gradients(model, images_BCHW, first_logit, points=points)
        gaps.append((found_BHW.sum((1, 2)) - difference_B).abs().max().item())
    assert gaps[1] < 0.01 * difference_B.abs().min()
    assert gaps[1] < gaps[0]
