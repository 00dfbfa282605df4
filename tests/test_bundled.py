"""The models that come with the package: small, described, found by name."""

from pathlib import Path

import pytest
import torch

import vitrine
from vitrine import bundled
from vitrine.cli import main


@pytest.mark.parametrize("name", bundled.names())
def test_a_bundled_model_loads_by_name_and_is_what_its_card_says(name: str) -> None:
    classifier, card = vitrine.load(name, device="cpu"), bundled.read_card(name)
    parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
    assert parameters == card.parameters
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    assert 0.5 < card.test_accuracy < 1
    assert abs(card.test_accuracy - card.validation_accuracy) < 0.03


def test_bundled_files_stay_small_and_tell_of_no_machine() -> None:
    assert bundled.DEFAULT in bundled.names()
    assert sum(path.stat().st_size for path in bundled.FOLDER.iterdir()) < 12 * 2**20
    for name in bundled.names():
        head = bundled.weights_path(name).read_bytes()[:20_000]
        assert b"/tmp" not in head
        assert b"/home" not in head


def test_a_path_of_a_bundled_name_is_reached_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert vitrine.load("cifar10", device="cpu").source == "cifar10"
    with pytest.raises(vitrine.VitrineError):
        vitrine.load("./cifar10", device="cpu")


def test_info_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "Bundled models" in shown
    assert f"{bundled.read_card('cifar10').test_accuracy:.2%}" in shown
