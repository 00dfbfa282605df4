"""The page of a large network: its size, and what it computes from a byte per number."""

import base64
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from test_page import embedded, make_data
from vitrail.cli import main
from vitrail.config.settings import Config, ModelConfig
from vitrail.explain import large_page
from vitrail.explain.explanation import Subject, explain
from vitrail.explain.large_page import LayerDetail, choose_layers, encode_detail, is_large
from vitrail.explain.map_settings import MapSettings
from vitrail.explain.page import PageData, describe, make_page, page_data
from vitrail.model.vit import VisionTransformer
from vitrail.weights.checkpoint import CheckpointInfo, save_weights_file

SMALL = ModelConfig(
    image_size=(20, 28), patch_size=4, embed_dim=24, n_layers=3, n_attention_heads=3, n_classes=0,
    n_registers=2, head="linear",
)  # fmt: skip
VIT_S = dataclasses.replace(
    SMALL, image_size=518, patch_size=14, embed_dim=384, n_layers=12, n_attention_heads=6,
    n_registers=4,
)  # fmt: skip


def make_model(config: ModelConfig) -> VisionTransformer:
    """Random weights that are not small, so that attention is not uniform."""
    torch.manual_seed(4)
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def make_subject(model: VisionTransformer) -> Subject:
    """Noise as a picture of the model's size."""
    height, width = model.config.image_hw
    raw_HWC = np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8)
    image_1CHW = torch.from_numpy(raw_HWC).permute(2, 0, 1)[None] / 128 - 1
    classes = tuple("abcdefghij"[: model.config.n_classes])
    return Subject(model, image_1CHW, raw_HWC, raw_HWC, "crop", classes)


def make_page_data(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, **settings: Any
) -> tuple[PageData, torch.Tensor]:
    """The page's data as if the network were large, and the attention (L, A, T, T)."""
    monkeypatch.setattr(large_page, "ROOM", 5_000)
    model = make_model(config)
    subject = make_subject(model)
    data = page_data(explain(subject, MapSettings(method="attention", **settings)))
    with torch.no_grad():
        attentions = model.forward_with_attention(subject.image_1CHW)[1]
    return data, torch.cat(attentions)


def read_attention(detail: dict[str, Any], A: int) -> np.ndarray:
    """The attention (A, T, T) that the page computes."""

    def read(name: str, kind: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(detail[name]), kind).astype(np.float64)

    totals_AT = read("totals", "<f4").reshape(A, -1)
    T = totals_AT.shape[1]
    q_ATK, k_ATK = (
        read(name, "i1").reshape(A, T, -1) * read(f"{scales}Scales", "<f4").reshape(A, T, 1)
        for name, scales in (("queries", "query"), ("keys", "key"))
    )
    return np.exp(q_ATK @ k_ATK.transpose(0, 2, 1) - totals_AT[..., None])


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "pool": "mean", "n_registers": 0}])
def test_attention_from_bytes_is_that_of_the_model(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    data, attention_LATT = make_page_data(monkeypatch, dataclasses.replace(SMALL, **changes))
    assert data.attention_LATT is None
    assert data.rows_LAT is not None
    rows_LAT = attention_LATT.mean(2) if data.mean_pool else attention_LATT[:, :, 0]
    np.testing.assert_allclose(data.rows_LAT, rows_LAT, atol=1e-6)
    assert [detail.layer for detail in data.details] == [3]
    shown = describe(data)
    read_ATT = read_attention(shown["details"][0], 3)
    assert np.abs(read_ATT - attention_LATT[2].numpy()).sum(-1).max() < 0.03  # of 1
    tokens_ND = np.frombuffer(base64.b64decode(shown["details"][0]["tokens"]), "i1")
    tokens_ND = tokens_ND.reshape(35, -1).astype(float)
    cosines_N = tokens_ND @ tokens_ND[2 * 7 + 3]
    cosines_N /= np.linalg.norm(tokens_ND, axis=1) * np.linalg.norm(tokens_ND[2 * 7 + 3])
    np.testing.assert_allclose(cosines_N, data.maps["similarity"][2].ravel(), atol=0.01)


def test_layers_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    data, attention_LATT = make_page_data(monkeypatch, SMALL, layers=(1, 2))
    assert [detail.layer for detail in data.details] == [1, 2]
    read_ATT = read_attention(encode_detail(data.details[0]), 3)
    assert np.abs(read_ATT - attention_LATT[0].numpy()).sum(-1).max() < 0.03


def test_which_networks_are_large() -> None:
    assert not is_large(SMALL)
    assert not is_large(dataclasses.replace(SMALL, image_size=32, embed_dim=192, n_layers=6))
    assert is_large(VIT_S)
    assert choose_layers(VIT_S) == (12,)
    at_224 = dataclasses.replace(VIT_S, image_size=224)
    assert choose_layers(at_224) == (2, 3, 5, 6, 8, 9, 11, 12)
    assert choose_layers(dataclasses.replace(VIT_S, embed_dim=1536)) == (12,)


def test_a_page_of_a_vit_s_at_518_pixels_stays_under_five_megabytes() -> None:
    random, (T, N) = np.random.default_rng(3), (1374, 1369)
    vectors_ATK = random.normal(size=(6, T, 64))
    (layer,) = choose_layers(VIT_S)
    detail = LayerDetail(
        layer, vectors_ATK, vectors_ATK, np.ones((6, T)), random.normal(size=(N, 384))
    )
    noise = random.integers(0, 256, (1200, 1200, 3), np.uint8)
    one_LGJ = np.ones((12, 37, 37))
    maps = {"attention": one_LGJ, "rollout": one_LGJ, "relevance": one_LGJ, "balanced": one_LGJ[:1],
            "gradient_rollout": one_LGJ, "norms": one_LGJ, "similarity": one_LGJ,
            "features": np.ones((12, 37, 37, 3))}  # fmt: skip
    data = make_data(
        grid_GJ=(37, 37), layers=12, heads=1, n_registers=4, maps=maps, attention_LATT=None,
        rows_LAT=np.full((12, 6, T), 1 / T), details=(detail,), picture=Image.fromarray(noise),
        box=(0, 0, 1200, 1200),
    )  # fmt: skip
    assert 3_000_000 < len(make_page(data)) < 5_000_000


def test_the_command_writes_the_page_of_1369_tokens_without_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(VIT_S, embed_dim=16, n_layers=2, n_attention_heads=2)
    weights = make_model(config).state_dict()
    info = CheckpointInfo(Config(model=config), (), {}, {})
    save_weights_file(tmp_path / "net.safetensors", info, weights)
    noise = np.random.default_rng(2).integers(0, 256, (600, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    command = ["explain", str(tmp_path / "net.safetensors"), str(tmp_path / "noise.png")]
    page = tmp_path / "page.html"
    assert main([*command, "--layers", "1,2", "--output_path", str(page)]) == 0
    shown = embedded(page.read_text())
    assert page.stat().st_size < 5_000_000
    assert [detail["layer"] for detail in shown["details"]] == [1, 2]
    assert shown["predictions"] == [[], [], []]
    assert set(shown["maps"]) == {"attention", "rollout", "features", "similarity", "norms"}
    assert main([*command, "--query", "1,2", "--output_path", str(page)]) == 2
    assert "leave out --query" in capsys.readouterr().err


def test_layers_of_a_page_that_has_all_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    command = ["explain", "cifar10", str(tmp_path / "a.png"), "--format", "html", "--layers", "1"]
    assert main(command) == 2
    assert "leave out --layers" in capsys.readouterr().err
