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
    [-0.4421, -0.4097, 4.2971, -0.2537, -0.6287, -0.4667, -0.7031, -0.5688, -0.4411, -0.7603],
    [-0.4857, 0.0857, 4.0733, -0.5065, -0.6065, -0.3675, -0.7028, -0.6269, -0.4156, -0.6396],
    [-0.2822, 2.7332, 1.5706, -0.5814, -0.7908, -0.5444, -0.7071, -0.8054, -0.2010, 0.1138],
    [0.5412, -0.5566, 4.1590, -0.5795, -0.6685, -0.6452, -0.7831, -0.5998, -0.3139, -0.8241],
    [-0.2679, 1.3165, 3.1151, -0.7995, -0.6166, -0.6994, -0.6924, -0.5430, -0.2499, -0.4525],
    [-0.0521, 3.9501, 0.1446, -0.7301, -0.6039, -0.5650, -0.3430, -0.3459, -0.1174, -0.1372],
    [0.4158, -0.5834, 4.0999, -0.4306, -0.6458, -0.5294, -0.7061, -0.4545, -0.4745, -0.8712],
    [0.0645, 3.2751, 0.7311, -0.8477, -0.7528, -0.6064, -0.3788, -0.5515, 0.0460, -0.0632],
    [-0.4522, 1.7851, 0.4704, -1.0082, -0.7607, -0.7414, 0.7783, -0.2620, -0.8107, 0.6174],
    [-0.0842, -0.4306, 3.6467, 0.1554, -0.8855, -0.7914, -0.1122, -0.5834, -0.4944, -0.8081],
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
