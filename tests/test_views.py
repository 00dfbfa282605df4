"""Views of the tokens: colors, similarity and norms against independent formulas; sheets."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitrail
from vitrail.cli import main
from vitrail.config.drawing import Look
from vitrail.errors import ConfigError
from vitrail.explain.draw import draw_frames, draw_table, save
from vitrail.explain.explanation import Explanation, Subject, compare, explain, share_colors
from vitrail.explain.map_metrics import score_methods
from vitrail.explain.map_settings import TITLES, VIEWS, MapSettings, Method
from vitrail.explain.methods import compute_maps
from vitrail.explain.page import describe, page_data
from vitrail.explain.panels import COLORS, SIGNS
from vitrail.explain.token_views import fit_colors
from vitrail.inference.classifier import Classifier
from vitrail.model.vit import VisionTransformer

MakeModel = Callable[..., VisionTransformer]


@pytest.fixture
def classifier() -> Classifier:
    return vitrail.load("cifar10", device="cpu")


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three pictures of different shapes in the folder ``pics``; the current folder is above it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    random = np.random.default_rng(4)
    for name, size in (("a", (60, 40)), ("b", (40, 70)), ("c", (32, 32))):
        small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        small.resize(size).save(tmp_path / "pics" / f"{name}.png")
    return [f"pics/{name}.png" for name in "abc"]


def tokens_of(model: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """The patch tokens after every block (B, L, N, D)."""
    with torch.no_grad():
        blocks = [tokens_BTD for _, tokens_BTD, _ in model.run_blocks(model.embed(images_BCHW))]
    return torch.stack(blocks, dim=1)[:, :, -35:]


# The numbers.


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_are_the_principal_components_of_all_images_together(
    make_model: MakeModel, images_BCHW: Tensor, pool: str
) -> None:
    model = make_model(pool)
    maps = compute_maps(model, images_BCHW, MapSettings(method="features"))
    assert maps.values_BLGJ.shape == (5, 3, 5, 7, 3)
    assert maps.layers == (1, 2, 3)
    tokens_BLND = tokens_of(model, images_BCHW)
    before_CD = None
    for index in range(3):
        tokens_XD = tokens_BLND[:, index].flatten(0, 1).numpy().astype(np.float64)
        centered_XD = tokens_XD - tokens_XD.mean(1, keepdims=True)
        scaled_XD = centered_XD / np.sqrt((centered_XD**2).mean(1, keepdims=True) + 1e-5)
        scaled_XD -= scaled_XD.mean(0)
        first_CD = np.linalg.svd(scaled_XD, full_matrices=False)[2][:3]
        # Signs: the largest loading is positive, then as in the layer before.
        along_C = first_CD[np.arange(3), np.abs(first_CD).argmax(1)]
        if before_CD is not None:
            along_C = (first_CD * before_CD).sum(1)
        before_CD = first_CD * np.sign(along_C)[:, None]
        components_XC = scaled_XD @ before_CD.T
        low_C, high_C = np.quantile(components_XC, (0.01, 0.99), axis=0)
        colors_XC = ((components_XC - low_C) / (high_C - low_C)).clip(0, 1)
        found_XC = maps.values_BLGJ[:, index].reshape(-1, 3)
        np.testing.assert_allclose(found_XC.numpy(), colors_XC, atol=2e-3)


def test_pictures_with_one_basis_have_the_colors_of_the_batch(
    make_model: MakeModel, images_BCHW: Tensor
) -> None:
    model, settings = make_model(), MapSettings(method="features", layers=(1, 3), chunk=2)
    basis = fit_colors(model, images_BCHW, chunk=2)
    together = compute_maps(model, images_BCHW, settings)
    assert together.layers == (1, 3)
    for index in range(5):
        alone = compute_maps(model, images_BCHW[[index]], settings, basis=basis)
        torch.testing.assert_close(
            alone.values_BLGJ[0], together.values_BLGJ[index], atol=1e-4, rtol=0
        )
    own = compute_maps(model, images_BCHW[:1], settings)
    assert (own.values_BLGJ[0] - together.values_BLGJ[0]).abs().max() > 0.1


def test_one_outlier_does_not_take_the_range(make_model: MakeModel, images_BCHW: Tensor) -> None:
    model = make_model("mean")
    usual = compute_maps(model, images_BCHW, MapSettings(method="features"))
    spread = usual.values_BLGJ.flatten(0, 3).quantile(0.75, 0) - usual.values_BLGJ.flatten(
        0, 3
    ).quantile(0.25, 0)
    assert spread.min() > 0.15
    assert usual.values_BLGJ.min() == 0
    assert usual.values_BLGJ.max() == 1


def test_a_component_without_variation_is_gray(make_model: MakeModel) -> None:
    model = make_model("mean", position="rope", stem="patch")
    maps = compute_maps(model, torch.ones(2, 3, 20, 28), MapSettings(method="features"))
    assert (maps.values_BLGJ == 0.5).all()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_similarity_is_the_cosine_to_the_asked_patch(
    make_model: MakeModel, images_BCHW: Tensor, pool: str
) -> None:
    model = make_model(pool)
    tokens_BLND = tokens_of(model, images_BCHW)
    for query, asked in ((None, (2, 3)), ((4, 0), (4, 0))):
        maps = compute_maps(model, images_BCHW, MapSettings(method="similarity", query=query))
        one_BL1D = tokens_BLND[:, :, [asked[0] * 7 + asked[1]]]
        expected_BLN = torch.cosine_similarity(tokens_BLND, one_BL1D, dim=-1)
        torch.testing.assert_close(maps.values_BLGJ.flatten(2), expected_BLN)
        assert maps.query == asked
        assert maps.values_BLGJ[:, :, asked[0], asked[1]].min() > 0.9999


def test_norms_are_those_of_the_patch_tokens(make_model: MakeModel, images_BCHW: Tensor) -> None:
    model = make_model()
    maps = compute_maps(model, images_BCHW, MapSettings(method="norms", layers=(2,)))
    expected_BN = tokens_of(model, images_BCHW)[:, 1].square().sum(-1).sqrt()
    torch.testing.assert_close(maps.values_BLGJ[:, 0].flatten(1), expected_BN)


@pytest.mark.parametrize("method", VIEWS)
def test_views_need_neither_color_images_nor_many_dimensions(
    make_model: MakeModel, method: Method
) -> None:
    model = make_model("mean", n_channels=1, embed_dim=2, n_attention_heads=1, position="learned")
    maps = compute_maps(model, torch.randn(2, 1, 20, 28), MapSettings(method=method))
    assert maps.values_BLGJ.isfinite().all()
    assert maps.values_BLGJ.shape[:4] == (2, 3, 5, 7)


# What is refused.


@pytest.mark.parametrize("method", VIEWS)
def test_views_are_not_importance_maps(
    make_model: MakeModel, images_BCHW: Tensor, method: Method
) -> None:
    with pytest.raises(ConfigError, match="not what the prediction depends on"):
        score_methods(make_model(), images_BCHW, None, [method])
    for changes in ({"against": 1}, {"fusion": "max"}, {"window": 3}):
        with pytest.raises(ConfigError, match=r"no effect.*shows the tokens"):
            MapSettings(method=method, **changes)  # type: ignore[arg-type]


def test_invalid_calls_of_views(make_model: MakeModel, images_BCHW: Tensor) -> None:
    model = make_model()
    basis = fit_colors(model, images_BCHW)
    with pytest.raises(ConfigError, match="leave out basis"):
        compute_maps(model, images_BCHW, MapSettings(method="norms"), basis=basis)
    with pytest.raises(ConfigError, match="at least one image"):
        fit_colors(model, images_BCHW[:0])
    with pytest.raises(ConfigError, match="outside"):
        compute_maps(model, images_BCHW, MapSettings(method="similarity", query=(5, 0)))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("pics/a.png --method features --class cat", ["features is the same for every class"]),
        ("pics/a.png --method norms --against cat", ["against has no effect", "norms"]),
        ("pics/a.png --method features --query 1,1", ["query has no effect"]),
        ("pics/a.png --method featurs", ["did you mean", "features"]),
        ("pics/a.png --method features --frames training", ["cannot show method features"]),
        ("pics/a.png --method features,norms --output_path x.npz", ["request it separately"]),
        ("pics/a.png --method occlusion:window=1", ["only --score accepts: give --window 1"]),
        ("pics/a.png --method occlusion:window", ["'occlusion:window' is not a variant"]),
        ("pics/a.png --method balanced:foo=1", ["'balanced:foo=1' is not a variant"]),
        ("--score --method relevance,norms", ["norms", "has no score"]),
    ],
)
def test_invalid_views_are_one_line(
    words: str, parts: list[str], pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--model_path", "cifar10", *words.split()]) == 2
    printed = capsys.readouterr().err
    for part in parts:
        assert part in " ".join(printed.split())


# Drawings.


def subjects_of(classifier: Classifier, pictures: list[str]) -> list[Subject]:
    return [classifier.subject(name) for name in pictures]


def test_colors_are_drawn_as_they_are(classifier: Classifier, pictures: list[str]) -> None:
    found = classifier.explain(pictures[2], method="features")
    assert found.maps_FGJ.shape == (4, 8, 8, 3)
    opaque = draw_frames(found, Look(alpha=1.0))[3]
    drawn_HWC = np.asarray(opaque).astype(int)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        color_C = np.round(255 * found.maps_FGJ[3, row, column])
        assert (np.abs(drawn_HWC - color_C).max(axis=2) <= 2).any()


def test_pictures_take_the_colors_of_others(classifier: Classifier, pictures: list[str]) -> None:
    basis = fit_colors(classifier.model, classifier.prepare(pictures))
    shared = classifier.explain(pictures[0], method="features", basis=basis).maps_FGJ
    expected = explain(
        share_colors(subjects_of(classifier, pictures))[0], MapSettings(method="features")
    )
    np.testing.assert_allclose(shared, expected.maps_FGJ, atol=1e-3)
    assert np.abs(shared - classifier.explain(pictures[0], method="features").maps_FGJ).max() > 0.1
    with pytest.raises(ConfigError, match="only method features uses a basis"):
        classifier.explain(pictures[0], method="norms", basis=basis)


def test_frames_mark_the_asked_patch(classifier: Classifier, pictures: list[str]) -> None:
    for query, asked in ((None, (4, 4)), ((1, 2), (1, 2))):
        found = classifier.explain(pictures[0], method="similarity", query=query)
        assert [frame.query for frame in found.frames] == [asked] * 4
    assert found.titles == ("layer 1", "layer 2", "layer 3", "layer 4")


def test_numbers_of_colors_have_a_channel(
    classifier: Classifier, pictures: list[str], tmp_path: Path
) -> None:
    found = classifier.explain(pictures[0], method="features", layers=(2,))
    lines = save(found, tmp_path / "x.csv", Look()).read_text().splitlines()
    assert lines[0] == "frame,title,row,column,channel,value"
    assert len(lines) == 1 + 8 * 8 * 3
    with np.load(save(found, tmp_path / "x.npz", Look())) as archive:
        assert np.array_equal(archive["maps_FGJ"], found.maps_FGJ)


def words_of(explanations: list[Explanation], **look: Any) -> list[str]:
    return [text.get_text() for text in draw_table(explanations, Look(**look)).texts]


def test_a_sheet_has_a_row_per_picture_and_a_legend_per_kind(
    classifier: Classifier, pictures: list[str]
) -> None:
    methods: tuple[Method, ...] = ("rollout", "occlusion", "features")
    settings = [MapSettings(method=method) for method in methods]
    subjects = share_colors(subjects_of(classifier, pictures))
    rows = [compare(subject, settings) for subject in subjects]
    figure = draw_table(rows, Look())
    assert len(figure.axes) == 3 * 4 + 3
    titles = [axes.get_title(loc="left") for axes in figure.axes[:12]]
    marks = ["✗ " if frame.failures else "" for frame in rows[0].frames]
    expected = [mark + TITLES[method] for mark, method in zip(marks, methods, strict=True)]
    assert titles[1:4] == expected
    assert titles[::4] == [row.frames[0].prediction for row in rows]
    words = [text.get_text() for text in figure.texts]
    assert words[:3] == ["a.png", "b.png", "c.png"]
    parts = ("lowest to highest, each map", f"{SIGNS}, each map", COLORS)
    assert [sum(part in word for word in words) for part in parts] == [1, 1, 1]
    # The colors are one set: those of the three images together.
    images_BCHW = torch.cat([subject.image_1CHW for subject in subjects])
    shared = compute_maps(classifier.model, images_BCHW, settings[2]).values_BLGJ[:, -1]
    for row, map_GJC in zip(rows, shared, strict=True):
        np.testing.assert_allclose(row.frames[2].map_GJ, map_GJC.numpy(), atol=1e-3)


def test_unsigned_sheets_have_no_legend_for_signs(
    classifier: Classifier, pictures: list[str]
) -> None:
    settings = [MapSettings(method="rollout"), MapSettings(method="relevance")]
    rows = [compare(subject, settings) for subject in subjects_of(classifier, pictures)]
    assert not any(SIGNS in word for word in words_of(rows))


def test_several_pictures_and_methods_are_one_sheet(
    pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["explain", "pics", "--model_path", "cifar10", "--method", "rollout,norms"]
    assert main(command) == 0
    assert "3 pictures, 2 methods" in capsys.readouterr().out
    assert sorted(path.name for path in Path("output/explain").iterdir()) == [
        "sheet-rollout-norms.png"
    ]
    assert main([*command, "--output_path", "all.svg"]) == 0
    assert Path("all.svg").read_text().startswith("<?xml")
    assert main([*command, "--format", "npz", "--output_path", "numbers"]) == 0
    assert len(list(Path("numbers").iterdir())) == 3


def test_too_many_rows_are_refused_before_anything_is_computed(
    classifier: Classifier, pictures: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("vitrail.explain.draw.MOST_ROWS", 2)
    monkeypatch.setattr("vitrail.cli.explain._explain_one", None)
    assert main(["explain", "pics", "--model_path", "cifar10", "--method", "all"]) == 2
    assert "at most 2" in capsys.readouterr().err


def test_several_pictures_share_their_colors(pictures: list[str]) -> None:
    command = ["explain", "--model_path", "cifar10", "--method", "features", "--format", "npz"]
    assert main([*command, "pics", "--output_path", "three"]) == 0
    assert main([*command, "pics/a.png", "--output_path", "one"]) == 0
    with np.load("three/a-features.npz") as three, np.load("one/a-features.npz") as one:
        assert np.abs(three["maps_FGJ"] - one["maps_FGJ"]).max() > 0.1
    explained = explain(
        share_colors(subjects_of(vitrail.load("cifar10"), sorted(pictures)))[0],
        MapSettings(method="features"),
    )
    with np.load("three/a-features.npz") as three:
        np.testing.assert_allclose(three["maps_FGJ"], explained.maps_FGJ, atol=1e-3)


def test_a_page_has_the_views_of_its_picture(classifier: Classifier, pictures: list[str]) -> None:
    data = page_data(classifier.explain(pictures[0]))
    images_1CHW = classifier.prepare(pictures[0])
    for method in ("features", "norms"):
        maps = compute_maps(classifier.model, images_1CHW, MapSettings(method=method))  # type: ignore[arg-type]
        np.testing.assert_allclose(data.maps[method], maps.values_BLGJ[0].numpy(), atol=1e-5)
    assert data.similarity_LNN is not None
    maps = compute_maps(
        classifier.model, images_1CHW, MapSettings(method="similarity", query=(1, 2))
    )
    expected_LN = maps.values_BLGJ[0].flatten(1).numpy()
    np.testing.assert_allclose(data.similarity_LNN[:, 10], expected_LN, atol=1e-5)
    stored = np.frombuffer(base64.b64decode(describe(data)["similarity"]), "<i2") / 32767
    np.testing.assert_allclose(stored, data.similarity_LNN.ravel(), atol=2e-5)


def test_pictures_of_a_sheet_have_one_size(classifier: Classifier, tmp_path: Path) -> None:
    rows = []
    for name, size in (("large", (900, 300)), ("small", (32, 32)), ("tall", (40, 60))):
        Image.new("RGB", size, "gray").save(tmp_path / f"{name}.png")
        subject = classifier.subject(str(tmp_path / f"{name}.png"))
        rows.append(compare(subject, [MapSettings(method=m) for m in ("norms", "rollout")]))  # type: ignore[arg-type]
    figure = draw_table(rows, Look())
    places = [axes.get_window_extent() for axes in figure.axes[:9]]
    longer = [max(place.width, place.height) for place in places]
    assert max(longer) - min(longer) < 1
    assert places[0].width / places[0].height == pytest.approx(3, rel=0.02)
