"""The models that come with the package: small, described, found by name."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import vitrail
from vitrail.cli import main
from vitrail.data.images import normalize
from vitrail.weights import bundled


@pytest.mark.parametrize("name", bundled.names())
def test_a_bundled_model_loads_by_name_and_matches_its_card(name: str) -> None:
    classifier, card = vitrail.load(name, device="cpu"), bundled.read_card(name)
    parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
    assert parameters == card.parameters
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    assert 0.5 < card.test_accuracy < 1
    held_out = classifier.config.data.validation_images != 0  # None: a tenth
    assert (card.validation_accuracy is not None) == held_out
    assert abs(card.test_accuracy - (card.validation_accuracy or card.test_accuracy)) < 0.03
    assert (classifier.calibration.temperature != 1) == held_out
    assert len(classifier.calibration.distances) == 101 * held_out


CIFAR10_LOGITS = [
    [-1.3393, -2.1318, 2.9243, -1.5181, -2.1627, -2.2221, -2.3041, -2.1644, -2.4933, -2.3842],
    [-0.8385, -2.0887, 2.6882, -1.2905, -2.4684, -2.3191, -2.4953, -2.4295, -2.4838, -2.5723],
    [-0.9279, -1.6363, 2.3186, -1.0556, -2.3031, -2.4469, -2.2501, -2.6701, -2.0547, -2.4130],
    [0.1079, -2.7050, 2.3108, -1.5934, -2.3417, -2.3459, -2.6507, -2.3065, -2.8208, -3.1066],
    [0.6362, -2.6349, 1.4793, -1.0925, -2.1145, -2.1953, -2.6062, -2.5644, -2.5876, -3.4103],
    [-0.7321, -2.0669, 2.0158, -1.2205, -2.3752, -2.0932, -1.9851, -2.3919, -2.6469, -2.4744],
    [0.5648, -3.1050, 1.2797, -0.2632, -2.3357, -1.7924, -2.7265, -2.2439, -3.0820, -3.5759],
    [-0.6187, -2.2116, 1.2911, 0.2981, -2.5708, -1.4583, -2.2281, -2.0710, -2.9169, -3.0526],
    [-1.6798, -2.0787, -0.1434, -0.1045, -2.6002, -0.5184, -0.5464, -2.3713, -3.3711, -0.9399],
    [0.0369, -2.7863, 0.3480, 1.0783, -2.2833, -1.2526, -2.1568, -2.2900, -2.7348, -3.5857],
]
"""The logits of the bundled model for the ten pictures of ``draw_rings``."""


def draw_rings(count: int) -> torch.Tensor:
    """Pictures of overlapping rings, in integer arithmetic: the same bytes everywhere."""
    sizes = map(torch.arange, (count, 3, 32, 32))
    b, c, y, x = torch.meshgrid(*sizes, indexing="ij")
    return (((x - 10 - b) ** 2 * (2 + c) + (y - 16) ** 2 * (1 + b % 3) + 7 * b * c) % 256).byte()


def test_the_bundled_model_gives_its_logits() -> None:
    classifier = vitrail.load("cifar10", device="cpu")
    images_BCHW = normalize(draw_rings(10), classifier.mean, classifier.std)
    with torch.inference_mode():
        logits_BY = classifier.model(images_BCHW)
    # A float32 sum of 1,000 products is off by at most 1,000 x 6e-8 of their size, in any order;
    # 15 such sums in a row by 1e-3 of logits about 1. (Seen against float64: 5e-6.) Any other
    # model is farther off: with twice the base of the rotary positions 20 to 107 times as far.
    torch.testing.assert_close(logits_BY, torch.tensor(CIFAR10_LOGITS), atol=1e-3, rtol=0)


def test_bundled_files_are_small_and_contain_no_local_paths() -> None:
    assert bundled.DEFAULT in bundled.names()
    assert sum(path.stat().st_size for path in bundled.FOLDER.iterdir()) < 12 * 2**20
    for name in bundled.names():
        head = bundled.weights_path(name).read_bytes()[:20_000]
        assert b"/tmp" not in head
        assert b"/home" not in head


def test_the_reference_is_drawn_as_in_its_notebook(tmp_path: Path) -> None:
    cat, out = Path(__file__).parents[1] / "examples/cat.jpg", tmp_path / "cat.gif"
    words = f"explain --model_path reference --style reference {cat} --output_path {out}"
    assert main(words.split()) == 0
    with Image.open(out) as image:
        frames = [np.array(f.convert("L"), dtype=float) for f in ImageSequence.Iterator(image)]
    assert len(frames) == 6
    for first, second in itertools.pairwise(frames):
        assert abs(first - second).mean() > 0.5


def test_info_without_validation_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "reference"]) == 0
    shown = capsys.readouterr().out
    assert f"{bundled.read_card('reference').test_accuracy:.2%}" in shown
    assert "validation accuracy" not in shown
    assert main(["info", "cifar10"]) == 0
    assert "validation accuracy" in capsys.readouterr().out


def test_a_path_with_a_bundled_name_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert vitrail.load("cifar10", device="cpu").source == "cifar10"
    for path in ("./cifar10", Path("cifar10")):
        with pytest.raises(vitrail.VitrailError, match=r"no model\.safetensors"):
            vitrail.load(path, device="cpu")


def test_a_missing_path_is_never_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same from Python and by every command that takes a model."""
    monkeypatch.chdir(tmp_path)
    for path in ("./cifar10", Path("cifar10")):
        with pytest.raises(vitrail.VitrailError, match="no such model"):
            vitrail.load(path, device="cpu")
    for words in (
        "test --model_path ./cifar10", "test ./cifar10", "inspect ./cifar10", "info ./cifar10",
        "convert ./cifar10 a.safetensors", "export --format torch ./cifar10",
        "explain --index 0 --model_path ./cifar10", "train --init ./cifar10 --dataset shapes",
    ):  # fmt: skip
        assert main(words.split()) == 2, words
        assert "vitrail: ./cifar10: no such model" in capsys.readouterr().err, words


def test_a_name_is_a_name_also_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert main(["info", "cifar10"]) == 0
    assert main(["convert", "cifar10", "a.safetensors"]) == 0
    assert main(["info", "./cifar10"]) == 2
    assert "no model.safetensors" in capsys.readouterr().err


def test_hub_ids_stay_as_they_are_typed() -> None:
    """As a path, hf:OWNER/NAME would become hf:OWNER\\NAME on Windows."""
    from vitrail.cli.convert import ConvertOptions
    from vitrail.cli.info import InfoOptions
    from vitrail.cli.options import ModelArgument, ModelOptions
    from vitrail.cli.parsing import parse
    from vitrail.cli.push import PushOptions

    for kind, words, name in (
        (ModelOptions, "--model_path hf:a/b", "model_path"), (ModelArgument, "hf:a/b", "model"),
        (ConvertOptions, "hf:a/b c", "source"), (InfoOptions, "hf:a/b", "model"),
        (PushOptions, "hf:a/b c/d", "model"),
    ):  # fmt: skip
        assert getattr(parse(kind, words.split(), prog="x"), name) == "hf:a/b"


def test_info_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "Bundled models" in shown
    assert f"{bundled.read_card('cifar10').test_accuracy:.2%}" in shown
