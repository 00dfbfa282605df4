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


CIFAR10_LOGITS = [
    [-0.7600, 0.1866, 1.4410, 1.9477, -1.4820, -0.1104, -1.1453, -0.6880, -0.0105, -1.1427],
    [-0.4009, 1.0947, 3.1339, -0.4136, -1.2312, -0.1031, -1.0835, -1.0243, -0.5811, -1.0274],
    [-0.1098, 0.4135, 2.5796, -0.0469, -1.0976, 0.8613, -1.5798, -1.1436, -0.8974, -1.0064],
    [0.0465, 0.7119, 0.9541, 0.9657, -1.3910, 1.1730, -1.3976, -0.8698, -0.6129, -1.0819],
    [-0.2292, 0.1204, 0.8076, -0.3639, -1.3301, 3.5319, -1.1790, -1.0591, -1.0275, -0.9458],
    [-0.0154, 0.4983, 2.4224, 0.0968, -1.3135, 1.0802, -1.3785, -1.4369, -1.3662, -0.4794],
    [0.9703, 0.0124, 1.8126, 0.8838, -1.2616, 1.0089, -1.4544, -1.2426, -1.4271, -1.4338],
    [0.0381, -0.2925, 2.0865, 0.4582, -1.3276, 1.9920, -1.2494, -1.2412, -1.3416, -1.3031],
    [-0.7970, -0.8603, 2.3282, -0.1696, 0.8613, 0.6991, -0.4012, -0.8726, -1.6425, -1.2892],
    [0.3683, 0.4402, 2.4987, 0.0070, -1.0843, 0.0049, -1.3121, -1.1968, -0.6263, -0.6214],
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
    # 15 such sums in a row by 1e-3 of logits about 1. (Seen against float64: 3e-6.) Any other
    # model is farther off: with twice the base of the rotary positions 15 to 42 times as far.
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
