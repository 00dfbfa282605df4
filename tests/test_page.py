import base64
import dataclasses
import hashlib
import io
import json
import re
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vitrail.errors import ConfigError
from vitrail.explain.page import PageData, describe, encode_attention, make_page

HOSTILE = "</script><img src=x onerror=alert(1)>&{{DATA}}\u202e\u2028"


def make_data(
    *, grid_GJ: tuple[int, int] = (2, 3), layers: int = 4, heads: int = 5, **changes: Any
) -> PageData:
    """A page of random numbers: 3 classes, a class token, a picture of 20 x 28 pixels."""
    random = np.random.default_rng(3)
    n_tokens = grid_GJ[0] * grid_GJ[1] + changes.get("class_token", True)
    if "attention_LATT" in changes:
        n_tokens = 1  # those are replaced
    raw_LATT = random.exponential(size=(layers, heads, n_tokens, n_tokens)) ** 3
    values: dict[str, Any] = {
        "picture": Image.fromarray(random.integers(0, 256, (20, 28, 3), dtype=np.uint8)),
        "box": (0, 0, 28, 20),
        "grid_GJ": grid_GJ,
        "class_token": True,
        "classes": ("cat", "dog", "eel"),
        "logits_Y": np.array([0.5, 2.0, -1.0]),
        "early_logits_LY": random.normal(size=(layers, 3)),
        "attention_LATT": raw_LATT / raw_LATT.sum(-1, keepdims=True),
        "maps": {"relevance": random.random((layers, *grid_GJ)), "gradcam": np.ones((1, *grid_GJ))},
        "title": "a picture",
    }
    return PageData(**(values | changes))


def embedded(page: str) -> dict[str, Any]:
    """The numbers in the page, as its script reads them."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    parsed: dict[str, Any] = json.loads(found[1])
    return parsed


def test_attention_is_accurate_with_one_byte_per_entry() -> None:
    attention_LATT = make_data().attention_LATT
    levels = np.frombuffer(base64.b64decode(encode_attention(attention_LATT)), np.uint8)
    squares_LATT = levels.reshape(attention_LATT.shape).astype(float) ** 2
    read_LATT = squares_LATT / squares_LATT.sum(-1, keepdims=True)
    largest_LAT1 = attention_LATT.max(-1, keepdims=True)
    assert np.abs(read_LATT - attention_LATT).max() < 0.01
    assert np.all(np.abs(read_LATT - attention_LATT) < 0.01 * largest_LAT1)


def test_predictions_are_softmax_best_first_and_the_last_is_the_models() -> None:
    data = make_data()
    predictions = describe(data)["predictions"]
    assert len(predictions) == len(data.early_logits_LY) + 1
    assert [entry["name"] for entry in predictions[-1]] == ["dog", "cat", "eel"]
    powers_Y = np.exp(data.logits_Y)
    assert predictions[-1][0]["probability"] == pytest.approx(powers_Y[1] / powers_Y.sum())
    first_Y = data.early_logits_LY[0]
    assert [entry["index"] for entry in predictions[0]] == np.argsort(-first_Y).tolist()


def test_huge_logits_are_still_probabilities() -> None:
    best = describe(make_data(logits_Y=np.array([5e3, -5e3, 0])))["predictions"][-1][0]
    assert best == {"index": 0, "name": "cat", "probability": 1.0}


def test_the_explained_class_is_the_predicted_one_or_the_given() -> None:
    assert describe(make_data())["explained"] == "dog"
    assert describe(make_data(explained=2))["explained"] == "eel"


def test_maps_keep_their_values() -> None:
    data = make_data()
    read = describe(data)["maps"]
    assert {name: entry["layers"] for name, entry in read.items()} == {"relevance": 4, "gradcam": 1}
    values = np.frombuffer(base64.b64decode(read["relevance"]["values"]), "<f4")
    assert np.array_equal(values.reshape(4, 2, 3), data.maps["relevance"].astype(np.float32))


def test_hostile_names_and_titles_stay_text() -> None:
    page = make_page(make_data(classes=("cat", HOSTILE, "eel"), title=HOSTILE)).decode()
    harmless = make_page(make_data()).decode()
    for tag in ("<script", "</script", "<img", "<meta", "<style"):
        assert page.count(tag) == harmless.count(tag)
    assert "\u202e" not in page
    assert "\u2028" not in page
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\u2028", "\ufffd")
    assert embedded(page)["explained"] == shown
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&amp;{{DATA}}\ufffd\ufffd" in page


def test_a_name_that_is_not_unicode_can_be_written() -> None:
    page = make_page(make_data(classes=("cat", "\udcff", "eel"), title="\udcff.png")).decode()
    assert "\ufffd.png" in page


def test_the_policy_lets_only_the_pages_own_style_and_script_run() -> None:
    page = make_page(make_data()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for kind in ("style", "script"):
        found = re.findall(rf"<{kind}>(.*?)</{kind}>", page, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in found]
        assert rules[f"{kind}-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert not re.search(r"\s(style|on\w+)=", page.split("<script>")[0])


def test_nothing_in_the_page_points_outside() -> None:
    page = make_page(make_data()).decode()
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", page) + re.findall(r"url\(", page)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "http://" not in page
    assert "https://" not in page


def test_a_small_picture_is_embedded_unchanged() -> None:
    data = make_data()
    page = make_page(data).decode()
    found = re.search(r"data:image/png;base64,([\w+/=]+)", page)
    assert found is not None
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(data.picture))
    assert embedded(page)["size"] == [28, 20]


@pytest.mark.parametrize("class_token", [True, False])
def test_a_six_by_four_model_with_a_big_photo_stays_under_two_megabytes(class_token: bool) -> None:
    noise = np.random.default_rng(4).integers(0, 256, (1200, 1100, 3), dtype=np.uint8)
    data = make_data(
        grid_GJ=(8, 8),
        layers=6,
        heads=4,
        class_token=class_token,
        picture=Image.fromarray(noise),
        box=(0, 50, 1100, 1150),
    )
    page = make_page(data)
    assert len(page) < 2_000_000
    assert embedded(page.decode())["size"] == [1100, 1200]


def test_color_maps_are_matplotlibs() -> None:
    page = make_page(make_data()).decode()
    for name in ("magma", "viridis", "cividis"):
        found = re.search(rf'{name}: "([0-9a-f]+)"', page)
        assert found is not None
        stops_K3 = np.frombuffer(bytes.fromhex(found[1]), np.uint8).reshape(-1, 3).astype(float)
        at_K = np.linspace(0, 1, len(stops_K3))
        drawn_N3 = np.stack(
            [np.interp(np.arange(256) / 255, at_K, stops_K3[:, c]) for c in range(3)], axis=1
        )
        exact_N3 = matplotlib.colormaps[name](np.arange(256))[:, :3] * 255
        assert np.abs(drawn_N3 - exact_N3).max() < 6


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("logits_Y", np.zeros(4), r"logits_Y has shape \(4,\), not \(3,\)"),
        ("early_logits_LY", np.zeros((5, 3)), "early_logits_LY has shape"),
        ("class_token", False, r"attention has shape \(4, 7, 7\), not \(4, 6, 6\)"),
        ("maps", {"rollout": np.zeros((3, 2, 3))}, "the map rollout has shape"),
        ("maps", {"rollout": np.full((4, 2, 3), np.nan)}, "the map rollout holds values"),
        ("logits_Y", np.array([0, np.inf, 0]), "logits_Y holds values"),
        ("maps", {"features": np.zeros((4, 2, 3))}, "the map features has shape"),
        ("similarity_LNN", np.zeros((4, 7, 7)), "similarity_LNN has shape"),
    ],
)
def test_inconsistent_sizes_are_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(make_data(), **{field: value})
