"""The model argument: the same options and messages in every command."""

import contextlib
import json
from pathlib import Path

import pytest

from vitrail.cli import main
from vitrail.weights import bundled

pytestmark = pytest.mark.usefixtures("rough_plots")

DATA = "--dataset shapes --num_test_images 20"


def loss(words: str, capsys: pytest.CaptureFixture[str]) -> float:
    """The test loss that vitrail test prints as JSON."""
    assert main(["test", *words.split(), *DATA.split(), "--json"]) == 0
    printed = capsys.readouterr()
    assert "output/tiny: 20 test images of shapes" in printed.err
    return float(json.loads(printed.out)["loss"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in output/tiny."""
    folder = tmp_path_factory.mktemp("trained")
    words = (
        "train --preset quick --embed_dim 16 --n_layers 1 --n_attention_heads 2 --dataset shapes "
        "--num_train_images 40 --num_test_images 20 --epochs 1 --folder_name tiny"
    )
    with contextlib.chdir(folder):
        assert main(words.split()) == 0
    return folder


def test_a_model_is_an_argument_or_a_flag(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    as_trained = loss("output/tiny", capsys)
    assert loss("--model_path output/tiny", capsys) == as_trained
    assert loss("output/tiny --mean 0.5 0.5 0.5", capsys) == as_trained
    assert loss("output/tiny --mean 0 0 0 --std 1 1 1", capsys) != as_trained
    assert main(["export", "output/tiny", "--format", "torch"]) == 0
    assert (trained / "tiny.pt2").is_file()
    assert main(["export", "tiny.onnx", "--format", "torch"]) == 2
    assert "an ONNX file works with vitrail predict only" in capsys.readouterr().err


def test_info_starts_with_the_accuracy_of_a_model(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    assert main(["info", "cifar10"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1].startswith("test accuracy")
    assert bundled.read_card("cifar10").recipe in "".join(lines)
    result = json.loads((trained / "output/tiny/result.json").read_text())
    assert main(["info", "output/tiny"]) == 0
    printed = capsys.readouterr().out
    first, _, rest = printed.partition("Settings")
    accuracy = result["test"]["accuracy"]
    words = (
        f"test accuracy       │ {accuracy:.2%}",
        "test images         │ 20",
        "validation accuracy",
        "32 x 32 pixels",
        "shapes",
        "10: ",
    )
    assert all(word in first for word in words), first
    assert "embed_dim" in rest


@pytest.mark.parametrize("command", ["test", "export --format torch", "inspect"])
def test_two_models_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "cifar10", "--model_path", "other"]) == 2
    assert "two models are named, cifar10 and --model_path other" in capsys.readouterr().err
