"""The temperature, and pictures unlike the training data: fitted, kept and used everywhere."""

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vitrail
from vitrail.cli import main
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.evaluation.calibration import (
    UNCALIBRATED,
    Calibration,
    describe_unlike,
    distance,
    fit,
)
from vitrail.evaluation.metrics import measure
from vitrail.explain.page import describe, page_data
from vitrail.inference.classifier import Classifier
from vitrail.inference.onnx_classifier import load_onnx
from vitrail.model.vit import VisionTransformer
from vitrail.weights.checkpoint import CheckpointInfo, load_weights_file, save_weights_file
from vitrail.weights.pretrained import read, remodel

CLASSES = ("a", "b", "c")
MODEL = ModelConfig(
    image_size=8, n_classes=3, patch_size=4, embed_dim=12, n_layers=1, n_attention_heads=3
)
ONE, TWELVE = (base64.b64encode(bytes(2 * count)).decode() for count in (1, 12))
"""As many zeros in float16; a picture's distance from such a mean is the norm of its features."""
PERCENTILES = tuple(np.linspace(1, 9, 101).tolist())
FITTED = Calibration(2.5, TWELVE, TWELVE, PERCENTILES, 0.2)


def sampled(count: int, scale: float) -> tuple[Tensor, Tensor]:
    """Logits that are too large by a factor, and labels drawn from the true probabilities."""
    generator = torch.Generator().manual_seed(1)
    logits_BY = 2 * torch.randn(count, 5, generator=generator)
    labels_B = torch.multinomial(logits_BY.softmax(1), 1, generator=generator)[:, 0]
    return scale * logits_BY, labels_B


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(3)
    model = VisionTransformer(dataclasses.replace(MODEL, init_std=0.5)).eval()
    return Classifier(model, Config(MODEL, DataConfig()), CLASSES, "made", calibration=FITTED)


@pytest.fixture
def weights_file(classifier: Classifier, tmp_path: Path) -> Path:
    info = CheckpointInfo(classifier.config, CLASSES, {}, {}, FITTED)
    save_weights_file(tmp_path / "m.safetensors", info, classifier.model.state_dict())
    return tmp_path / "m.safetensors"


@pytest.fixture
def picture_HWC() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def expected_of(classifier: Classifier, picture_HWC: np.ndarray) -> list[float]:
    """The calibrated probabilities, computed with torch alone."""
    with torch.no_grad():
        logits_1Y = classifier.model(classifier.prepare(picture_HWC))
    learned_Y = logits_1Y[0].softmax(0)
    plain_Y = torch.maximum(learned_Y - 0.2 / 3, learned_Y / 1000) ** (1 / 2.5)
    return (plain_Y / plain_Y.sum()).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", [0.2, 1, 6])
def test_the_temperature_undoes_a_factor_of_the_logits(scale: float) -> None:
    logits_BY, labels_B = sampled(20_000, scale)
    temperature = fit(logits_BY, labels_B, logits_BY).temperature
    assert temperature == pytest.approx(scale, rel=0.05)
    before, after = (
        measure(logits_BY, labels_B, classes="abcde", calibration=Calibration(t))
        for t in (1.0, temperature)
    )
    assert after.expected_calibration_error < 0.01
    assert after.calibration_error_before == before.expected_calibration_error
    assert (before.expected_calibration_error > 0.05) == (scale != 1)
    assert (after.accuracy, after.confusion_YY) == (before.accuracy, before.confusion_YY)


def test_label_smoothing_is_undone() -> None:
    logits_BY, labels_B = sampled(20_000, 1)
    learned_BY = (0.9 * logits_BY.softmax(1) + 0.02).log()
    plain = fit(learned_BY, labels_B, logits_BY)
    undone = fit(learned_BY, labels_B, logits_BY, smoothing=0.1)
    assert undone.temperature == pytest.approx(1, rel=0.05)
    errors, losses = [], []
    for calibration in (plain, undone):
        found = measure(learned_BY, labels_B, classes="abcde", calibration=calibration)
        assert found.smoothing == calibration.smoothing
        errors.append(found.expected_calibration_error)
        losses.append(found.loss)
    assert errors[1] < 0.01 < errors[0]
    assert losses[1] < losses[0]


def test_the_order_of_the_classes_stays() -> None:
    logits_BY = torch.linspace(12, -90, 40).repeat(2, 1)[:, torch.randperm(40)]
    calibration = Calibration(1.5, smoothing=0.1)
    assert calibration.scale(logits_BY).isfinite().all()
    assert torch.equal(calibration.scale(logits_BY).argsort(1), logits_BY.argsort(1))
    assert Calibration(1.5).scale(logits_BY).equal(logits_BY / 1.5)


@pytest.mark.parametrize("images", [1, 5, 100])
def test_images_that_are_all_right_or_all_wrong_leave_a_finite_temperature(images: int) -> None:
    labels_B = torch.arange(images) % 5
    for right in (True, False):
        logits_BY = 5 * torch.eye(5)[labels_B if right else (labels_B + 1) % 5]
        calibration = fit(logits_BY, labels_B, logits_BY)
        assert 0.01 < calibration.temperature < 200
        # Never surer than the number of images allows.
        assert calibration.probabilities(logits_BY.numpy()).max() < 1 - 0.5 / (images + 2)


def alike(count: int, seed: int) -> Tensor:
    """Features of 40 numbers, most of whose variance is in 5 of them, far from 0."""
    scale_D = torch.tensor([3.0] * 5 + [0.1] * 35)
    return 2 + scale_D * torch.randn(count, 40, generator=torch.Generator().manual_seed(seed))


def test_new_features_of_the_same_kind_are_unlike_in_one_of_20_cases() -> None:
    logits_BY, labels_B = sampled(2_000, 1)
    calibration = fit(logits_BY, labels_B, alike(2_000, 1))

    def unlike(features_BD: Tensor) -> float:
        familiarity_B = calibration.familiarity(features_BD.numpy())
        assert familiarity_B is not None
        return float(np.mean([bool(describe_unlike(f)) for f in familiarity_B]))

    assert unlike(alike(2_000, 2)) == pytest.approx(0.05, abs=0.02)
    further = 9 * (torch.arange(40) == 1) * torch.ones(100, 1)
    assert unlike(alike(100, 3) + further) < 0.15  # along a direction in which images differ
    assert unlike(alike(100, 3) + further.roll(20, 1)) == 1  # along one in which they do not


def test_the_distance_is_that_from_the_subspace_and_the_same_for_tensors() -> None:
    features_BD = np.array([[4.0, 2, 3], [1, 1, 1]], np.float32)
    mean_D, directions_KD = np.ones(3, np.float32), np.eye(3, dtype=np.float32)[:1]
    assert distance(features_BD, mean_D, directions_KD) == pytest.approx([5**0.5, 0])
    tensors = map(torch.from_numpy, (features_BD, mean_D, directions_KD))
    assert distance(*tensors).tolist() == pytest.approx([5**0.5, 0])


def test_what_is_said_of_unlike_pictures() -> None:
    assert "(more so than 98.0% of the validation images)" in describe_unlike(0.02)
    assert "than 99.9%" in describe_unlike(0.0)
    assert describe_unlike(0.05) == describe_unlike(None) == ""
    logits_BY, labels_B = sampled(199, 1)
    assert fit(logits_BY, labels_B, logits_BY).familiarity(logits_BY.numpy()) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"temperature": "hot"},
        {"smoothing": 1},
        {"distances": [1, 2]},
        {"mean": TWELVE},
        {"mean": "no base64", "distances": PERCENTILES},
        {"mean": ONE[:-2], "distances": PERCENTILES},
        {"mean": "AHw=", "distances": PERCENTILES},
        {"mean": TWELVE, "directions": ONE, "distances": PERCENTILES},
        {"heat": 1},
        [3],
    ],
    ids=str,
)
def test_a_corrupt_calibration_is_refused(weights_file: Path, wrong: object) -> None:
    info, _ = load_weights_file(weights_file)
    assert info.calibration == FITTED
    content = {**info.to_json(), "calibration": wrong}
    with pytest.raises(
        CheckpointError, match=r"temperature|smoothing|distances|base64|finite|wide|heat|calib"
    ):
        CheckpointInfo.from_json(content, weights_file)


def test_a_calibration_of_another_width_is_refused(weights_file: Path) -> None:
    content = load_weights_file(weights_file)[0].to_json()
    content["config"]["model"]["embed_dim"] *= 2
    with pytest.raises(CheckpointError, match="12 features, but the model has 24: fit it again"):
        CheckpointInfo.from_json(content, weights_file)


def test_files_of_former_versions_keep_their_temperature(weights_file: Path) -> None:
    content = load_weights_file(weights_file)[0].to_json()
    content["calibration"] = {"temperature": 2.5, "energies": PERCENTILES}
    assert CheckpointInfo.from_json(content, weights_file).calibration == Calibration(2.5)


def test_files_without_a_calibration_load_with_temperature_1(weights_file: Path) -> None:
    content = load_weights_file(weights_file)[0].to_json()
    del content["calibration"]
    assert CheckpointInfo.from_json(content, weights_file).calibration == UNCALIBRATED
    with pytest.raises(ConfigError, match="temperature is nan"):
        Calibration(float("nan"))


def test_every_probability_is_calibrated(weights_file: Path, picture_HWC: np.ndarray) -> None:
    classifier = vitrail.load(weights_file)
    expected_Y = expected_of(classifier, picture_HWC)
    (top,) = classifier.predict(picture_HWC, top_k=3)
    assert [p.probability for p in top] == pytest.approx(sorted(expected_Y, reverse=True))
    prepared = classifier.prepare(picture_HWC)
    assert classifier.probabilities(prepared)[0].tolist() == pytest.approx(expected_Y)
    explanation = classifier.explain(picture_HWC)
    assert explanation.frames[-1].prediction == f"{top[0].name} {max(expected_Y):.1%}"
    shown = describe(page_data(explanation))["predictions"]
    assert shown[-1][0]["probability"] == pytest.approx(max(expected_Y))


def test_another_head_needs_another_temperature(weights_file: Path) -> None:
    assert remodel(read(weights_file), MODEL, new_head=True).info.calibration == UNCALIBRATED


@pytest.mark.parametrize("raw", [False, True])
def test_an_exported_file_has_it_in_its_graph(
    classifier: Classifier, picture_HWC: np.ndarray, tmp_path: Path, raw: bool
) -> None:
    from vitrail.inference.export import to_onnx

    proto, _ = to_onnx(classifier, raw=raw)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    (top,) = load_onnx(tmp_path / "m.onnx").predict(picture_HWC)
    (expected,) = classifier.predict(picture_HWC)
    assert [p.name for p in top] == [p.name for p in expected]
    assert [p.probability for p in top] == pytest.approx(
        [p.probability for p in expected], rel=1e-4
    )
    assert top.familiarity == pytest.approx(expected.familiarity, abs=1e-4)


@pytest.mark.parametrize("unlike", [True, False])
def test_a_picture_unlike_the_training_images_is_said_to_be_so(
    classifier: Classifier,
    picture_HWC: np.ndarray,
    unlike: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture_HWC).save("x.png")
    distances = tuple(np.linspace(0, 0.01, 101) if unlike else np.linspace(90, 99, 101))
    calibration = dataclasses.replace(FITTED, distances=distances)
    info = CheckpointInfo(classifier.config, CLASSES, {}, {}, calibration)
    save_weights_file(Path("m.safetensors"), info, classifier.model.state_dict())
    sentence = "x.png: unlike the training images (more so than 99.9% of the validation images)"
    for words in (["predict", "x.png"], ["explain", "x.png", "--format", "html"]):
        assert main([*words, "--model_path", "m.safetensors"]) == 0
        assert (sentence in " ".join(capsys.readouterr().out.split())) == unlike
    page = next(Path().rglob("*.html")).read_text()
    assert ('"unlike":"unlike the training images' in page) == unlike
    assert main(["predict", "x.png", "--model_path", "m.safetensors", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["unlike"], row["familiarity"]) == (unlike, 0.0 if unlike else 1.0)
