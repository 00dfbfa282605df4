"""Equal logits: Vitrail and timm or Hugging Face, importing and exporting weights.

Skipped where those libraries are not installed. The largest difference is printed (pytest -s).
"""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vitrail
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.model.vit import VisionTransformer
from vitrail.weights.checkpoint import CheckpointInfo
from vitrail.weights.formats.convert import write_foreign

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
"""Those libraries emit warnings, and take a while to import."""
TOLERANCE = 1e-5


def peer(name: str) -> ModuleType:
    """Import a library to compare with, or skip."""
    return pytest.importorskip(name, exc_type=ImportError)


def randomize(model: nn.Module) -> nn.Module:
    """Draw every parameter anew, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(5)
    for tensor in model.parameters():
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def assert_equal_logits(what: str, ours: nn.Module, theirs: nn.Module, hw: tuple[int, int]) -> None:
    """Compare the logits of the same noise."""
    images_BCHW = torch.randn(5, 3, *hw, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours_BY, theirs_BY = ours(images_BCHW), theirs(images_BCHW)
    if not isinstance(theirs_BY, Tensor):
        theirs_BY = theirs_BY.logits
    difference = (ours_BY - theirs_BY).abs().max().item()
    print(f"\n{what}: max |difference| {difference:.1e} of logits up to {ours_BY.abs().max():.1f}")
    assert ours_BY.std() > 0.1
    assert difference < TOLERANCE


HF_CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tanh, no biases": {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False},
    "eps": {"layer_norm_eps": 1e-3},
    "not square": {"image_size": (20, 28)},
}


@pytest.mark.parametrize("change", HF_CHANGES)
def test_hugging_face_in(tmp_path: Path, change: str) -> None:
    transformers = peer("transformers")
    settings = {
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "num_labels": 7,
        "intermediate_size": 42, "image_size": 20, "patch_size": 4,
    }  # fmt: skip
    config = transformers.ViTConfig(**(settings | HF_CHANGES[change]))
    theirs = randomize(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    ours = vitrail.load(tmp_path, device="cpu")
    assert_equal_logits(
        f"Hugging Face in, {change}", ours.model, theirs, ours.config.model.image_hw
    )
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")  # the modules' own names
    again = vitrail.load(tmp_path, device="cpu").model.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in ours.model.state_dict().items())


TIMM_CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean beside a class token": {"global_pool": "avg"},
    "mean": {"global_pool": "avg", "class_token": False},
    "mean of normed": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "class token without position": {"no_embed_class": True},
    "no biases": {"qkv_bias": False},
    "layer scale": {"init_values": 0.1},
    "DeiT III": {"init_values": 0.1, "no_embed_class": True, "reg_tokens": 4},
    "registers with positions": {"reg_tokens": 3},
    "pre-norm": {"pre_norm": True},
}


@pytest.mark.parametrize("change", TIMM_CHANGES)
def test_timm_in(tmp_path: Path, change: str) -> None:
    peer("timm")
    from timm.models.vision_transformer import VisionTransformer as Theirs

    settings = {
        "img_size": 20, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3,
        "num_classes": 7, "mlp_ratio": 1.75,
    }  # fmt: skip
    theirs = randomize(Theirs(**(settings | TIMM_CHANGES[change])))
    for path in (tmp_path / "model.safetensors", tmp_path / "model.pth"):
        save = save_file if path.suffix == ".safetensors" else torch.save
        save(theirs.state_dict(), path)
        ours = vitrail.load(path, n_attention_heads=3, device="cpu")
        assert_equal_logits(f"timm in, {change}", ours.model, theirs, (20, 20))


BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "DINOv2": ("Dinov2", {}),
    "DINOv2 with registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "DINOv2 giant": ("Dinov2WithRegisters", {"use_swiglu_ffn": True}),
    "DINOv3": ("DINOv3ViT", {"intermediate_size": 42, "num_register_tokens": 2}),
    "DINOv3 gated": (
        "DINOv3ViT",
        {
            "intermediate_size": 42,
            "num_register_tokens": 2,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "query_bias": False,
            "value_bias": False,
        },
    ),
    "CLIP": ("CLIPVision", {"intermediate_size": 42}),
    "SigLIP": ("SiglipVision", {"intermediate_size": 42}),
}
SMALL = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 20,
    "patch_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("hw", [(20, 20), (28, 36)], ids=str)
def test_hugging_face_backbones_in(tmp_path: Path, family: str, hw: tuple[int, int]) -> None:
    transformers = peer("transformers")
    name, changes = BACKBONES[family]
    config = getattr(transformers, f"{name}Config")(**SMALL, **changes)
    theirs = randomize(getattr(transformers, f"{name}Model")(config))
    theirs.save_pretrained(tmp_path)
    network = vitrail.load(tmp_path, image_size=hw, device="cpu")
    ours, images_BCHW = network.model, torch.randn(2, 3, *hw)
    resizing = {} if "DINO" in name.upper() else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        out = theirs(images_BCHW, **resizing)
        tokens_BTD = ours.embed(images_BCHW)
        for _, output_BTD, _ in ours.run_blocks(tokens_BTD):
            tokens_BTD = output_BTD
    # CLIP applies its last norm to the class token only.
    last_BTD = tokens_BTD if name == "CLIPVision" else ours.norm(tokens_BTD)
    difference = float((last_BTD - out.last_hidden_state).abs().max())
    print(
        f"\n{family}, {hw}: max |difference| {difference:.1e}, values to {last_BTD.abs().max():.1f}"
    )
    assert difference < TOLERANCE * max(1, float(last_BTD.abs().max()))
    if name != "SiglipVision":  # which pools by an attention
        torch.testing.assert_close(ours(images_BCHW), out.pooler_output, atol=1e-5, rtol=1e-5)


def test_dinov2_with_classes_reads_the_class_token_and_the_mean(tmp_path: Path) -> None:
    transformers = peer("transformers")
    config = transformers.Dinov2WithRegistersConfig(**SMALL, num_labels=7)
    theirs = randomize(transformers.Dinov2WithRegistersForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    ours = vitrail.load(tmp_path, device="cpu").model
    assert_equal_logits("DINOv2 with classes in", ours, theirs, (20, 20))


@pytest.mark.parametrize("head", ["", "WithTeacher"])
def test_deit_in(tmp_path: Path, head: str) -> None:
    transformers = peer("transformers")
    config = transformers.DeiTConfig(**SMALL, intermediate_size=42, num_labels=7)
    theirs = randomize(getattr(transformers, f"DeiTForImageClassification{head}")(config))
    theirs.save_pretrained(tmp_path)
    ours = vitrail.load(tmp_path, device="cpu").model
    assert_equal_logits(f"DeiT{head} in", ours, theirs, (20, 20))


def write(folder: Path, layout: str, **changes: Any) -> VisionTransformer:
    """Write a random Vitrail model in another layout."""
    model = ModelConfig(
        image_size=(20, 28), n_classes=7, patch_size=4, embed_dim=24, n_layers=3,
        n_attention_heads=3, forward_mul=1.75, head="linear",
    )  # fmt: skip
    model = dataclasses.replace(model, **changes)
    ours = randomize(VisionTransformer(model))
    config = Config(model=model, data=DataConfig(fit="squash"))
    info = CheckpointInfo(config, tuple("abcdefg"), {}, {})
    write_foreign(folder, layout, info, ours.state_dict())
    return ours


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_act": "gelu_tanh", "layer_norm_eps": 1e-4}, {"position": "sincos"}],
    ids=str,
)
def test_hugging_face_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    transformers = peer("transformers")
    ours = write(tmp_path / "hf", "huggingface", **changes)
    theirs, loaded = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(loaded[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label[2] == "c"
    assert_equal_logits(f"Hugging Face out, {changes}", ours, theirs.eval(), (20, 28))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_norm_eps": 1e-6, "hidden_act": "gelu_tanh"},
        {"pool": "mean"},
        {"pool": "mean", "class_token": True, "fc_norm": True},
    ],
    ids=str,
)
def test_timm_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    timm = peer("timm")
    ours = write(tmp_path / "timm", "timm", **changes)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert theirs.pretrained_cfg["label_names"][2] == "c"
    assert_equal_logits(f"timm out, {changes}", ours, theirs, (20, 28))


def test_google_in_as_timm_reads_it(tmp_path: Path) -> None:
    peer("timm")
    from timm.models.vision_transformer import VisionTransformer as Theirs

    changes = {"image_size": 20, "hidden_act": "gelu_tanh", "layer_norm_eps": 1e-6}
    write(tmp_path / "google.npz", "google", **changes)
    theirs = Theirs(
        img_size=20, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=7,
        mlp_ratio=1.75, act_layer="gelu_tanh",
    )  # fmt: skip
    theirs.load_pretrained(tmp_path / "google.npz")
    ours = vitrail.load(tmp_path / "google.npz", device="cpu")
    assert_equal_logits("Google in, beside timm", ours.model, theirs.eval(), (20, 20))


def test_hugging_face_prepares_pictures_as_we_do(tmp_path: Path) -> None:
    transformers = peer("transformers")
    write(tmp_path / "hf", "huggingface")
    loaded = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    loaded.pop("image_processor_type")
    processor = transformers.ViTImageProcessorPil(**loaded)
    picture_HWC = np.random.default_rng(3).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    theirs_BCHW = processor(picture_HWC, return_tensors="pt")["pixel_values"]
    ours_BCHW = vitrail.load(tmp_path / "hf", device="cpu").prepare(picture_HWC)
    torch.testing.assert_close(theirs_BCHW, ours_BCHW, atol=1e-6, rtol=0)
