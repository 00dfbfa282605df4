"""The models that come with the package: small, described, found by name."""

from pathlib import Path

import pytest
import torch

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
    assert abs(card.test_accuracy - card.validation_accuracy) < 0.03
    assert classifier.calibration.temperature != 1
    assert len(classifier.calibration.distances) == 101


CIFAR10_LOGITS = [
    [-0.2096, 0.0314, 4.5415, 0.1731, -0.7224, -0.9793, -1.2181, -0.9046, -0.3736, -0.6544],
    [-0.3523, 0.7468, 4.5319, -0.4651, -0.7949, -1.3176, -0.9990, -0.9976, -0.1356, -0.4247],
    [-0.3472, 2.4634, 3.6403, -0.8646, -0.7795, -1.8098, -1.1993, -1.1280, -0.0244, 0.0238],
    [0.1564, 0.0323, 4.5830, -0.3603, -0.6438, -1.0754, -1.0439, -0.8740, -0.3516, -0.5678],
    [-0.0444, 1.3597, 4.2960, -0.9190, -0.6181, -1.6372, -1.0891, -0.9776, -0.1235, -0.5481],
    [0.4465, 2.7404, 2.7138, -1.0138, -0.5062, -1.9242, -0.8890, -1.2358, -0.4397, 0.1078],
    [0.2562, 0.3227, 4.2118, -0.3260, -0.7188, -1.0917, -1.1190, -1.0336, -0.5312, -0.3373],
    [-0.0663, 3.0061, 2.1399, -0.5264, -0.7343, -2.1217, -0.6142, -1.1451, -0.4617, 0.5889],
    [0.1431, 2.4389, 1.2982, -0.8514, -0.3977, -1.9992, -0.7154, -1.0461, -0.7566, 2.2726],
    [0.5216, 0.2774, 3.8890, 0.0173, -0.8245, -1.7252, -0.3565, -1.2696, -0.7823, -0.6032],
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
