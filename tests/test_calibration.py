"""The temperature, and pictures unlike the training data: fitted, kept and used everywhere."""

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
from vitrail.evaluation.calibration import UNCALIBRATED, Calibration, describe_unlike, fit
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
FITTED = Calibration(2.5, tuple(np.linspace(1, 2, 101).tolist()))


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
    return (logits_1Y[0] / 2.5).softmax(0).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", [0.2, 1, 6])
def test_the_temperature_undoes_a_factor_of_the_logits(scale: float) -> None:
    logits_BY, labels_B = sampled(20_000, scale)
    temperature = fit(logits_BY, labels_B).temperature
    assert temperature == pytest.approx(scale, rel=0.05)
    before, after = (
        measure(logits_BY, labels_B, classes="abcde", temperature=t) for t in (1, temperature)
    )
    assert after.expected_calibration_error < 0.01
    assert after.calibration_error_before == before.expected_calibration_error
    assert (before.expected_calibration_error > 0.05) == (scale != 1)
    assert (after.accuracy, after.confusion_YY) == (before.accuracy, before.confusion_YY)


@pytest.mark.parametrize("images", [1, 5, 100])
def test_images_that_are_all_right_or_all_wrong_leave_a_finite_temperature(images: int) -> None:
    labels_B = torch.arange(images) % 5
    for right in (True, False):
        logits_BY = 5 * torch.eye(5)[labels_B if right else (labels_B + 1) % 5]
        calibration = fit(logits_BY, labels_B)
        assert 0.01 < calibration.temperature < 200
        # Never surer than the number of images allows.
        assert calibration.probabilities(logits_BY.numpy()).max() < 1 - 0.5 / (images + 2)


def test_a_twentieth_of_the_validation_images_counts_as_unlike() -> None:
    logits_BY, labels_B = sampled(1_000, 1)
    familiarity_B = fit(logits_BY, labels_B).familiarity(logits_BY.numpy())
    assert familiarity_B is not None
    assert np.mean([bool(describe_unlike(f)) for f in familiarity_B]) == pytest.approx(0.05)
    assert "(2.0% of validation images score lower)" in describe_unlike(0.02)
    assert describe_unlike(None) == ""
    assert fit(logits_BY[:99], labels_B[:99]).energies == ()


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0}, {"temperature": "hot"}, {"energies": [1, 2]}, {"heat": 1}, [3]],
    ids=str,
)
def test_a_corrupt_calibration_is_refused(weights_file: Path, wrong: object) -> None:
    info, _ = load_weights_file(weights_file)
    assert info.calibration == FITTED
    content = {**info.to_json(), "calibration": wrong}
    with pytest.raises(CheckpointError, match=r"temperature|energies|heat|calibration"):
        CheckpointInfo.from_json(content, weights_file)


def test_files_without_a_calibration_load_with_temperature_1(weights_file: Path) -> None:
    content = load_weights_file(weights_file)[0].to_json()
    del content["calibration"]
    assert CheckpointInfo.from_json(content, weights_file).calibration == UNCALIBRATED
    with pytest.raises(ConfigError, match="temperature is nan"):
        Calibration(float("nan"))


def test_every_probability_is_divided_by_the_temperature(
    weights_file: Path, picture_HWC: np.ndarray
) -> None:
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
    assert top.familiarity == (None if raw else pytest.approx(expected.familiarity, abs=1e-4))


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
    energies = tuple(np.linspace(90, 99, 101) if unlike else np.linspace(-99, -90, 101))
    info = CheckpointInfo(classifier.config, CLASSES, {}, {}, Calibration(2.5, energies))
    save_weights_file(Path("m.safetensors"), info, classifier.model.state_dict())
    sentence = "x.png: unlike the training images (less than 0.1% of validation images score lower)"
    for words in (["predict", "x.png"], ["explain", "x.png", "--format", "html"]):
        assert main([*words, "--model_path", "m.safetensors"]) == 0
        assert (sentence in " ".join(capsys.readouterr().out.split())) == unlike
    page = next(Path().rglob("*.html")).read_text()
    assert ('"unlike":"unlike the training images' in page) == unlike
    assert main(["predict", "x.png", "--model_path", "m.safetensors", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["unlike"], row["familiarity"]) == (unlike, 0.0 if unlike else 1.0)
