"""``train.py`` and ``test.py``: all flags of the reference implementation, without its bugs."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageShow

import vitrail
from vitrail.cli import guarded
from vitrail.cli.reference import run_test, run_train
from vitrail.config.files import from_json
from vitrail.config.presets import get_preset

pytestmark = pytest.mark.usefixtures("rough_plots")

ROOT = Path(__file__).resolve().parents[1]
SMALL = shlex.split("--embed_dim 12 --n_layers 1 --n_attention_heads 3 --patch_size 8 --epochs 2")
TRAIN_FLAGS = {
    "--batch_size": "9", "--num_workers": "1", "--learning_rate": "0.001", "--warmup_epochs": "0",
    "--epochs": "2", "--device": "cpu", "--output_path": "out", "--timestamp": "noon",
    "--folder_name": "mine", "--model_name": "net", "--image_size": "16", "--n_channels": "1",
    "--patch_size": "8", "--n_classes": "10", "--data_path": "data", "--num_train_images": "50",
    "--num_test_images": "20", "--embed_dim": "12", "--n_layers": "2", "--n_attention_heads": "3",
    "--forward_mul": "1.5", "--dropout": "0.2", "--model_path": "weights",
}  # fmt: skip
"""Every flag of the reference's train.py, each with another value than its default."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first test that needs it has trained."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def weights(here: Path, cifar_folder: Path, once: Path) -> Path:
    """The weights that ``train.py`` writes to the path given by the reference's flags."""
    if not (once / "model").exists():
        assert run_train([*SMALL, "--device", "cpu", "--folder_name", "a"]) == 0
        for name in ("output", "model"):
            shutil.copytree(here / name, once / name)
    shutil.copytree(once, here, dirs_exist_ok=True)
    (path,) = here.glob("model/a/*.safetensors")
    return path


def wrong(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run test.py with invalid arguments; return its one-line error."""
    capsys.readouterr()
    assert guarded(run_test, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_flag_of_train_has_its_effect(here: Path, cifar_folder: Path) -> None:
    assert run_train([word for pair in TRAIN_FLAGS.items() for word in pair]) == 0
    folder = here / "out/mine"
    for name in ("graph_loss.png", "graph_accuracy.png", "confusion_matrix.png", "result.json"):
        assert (folder / name).stat().st_size > 100
    assert (here / "weights/mine/net-001.safetensors").exists()
    saved = from_json(json.loads((folder / "config.json").read_text())).flat()
    for flag, value in TRAIN_FLAGS.items():
        if flag not in ("--timestamp", "--data_path"):
            assert str(saved[flag[2:]]) == value or saved[flag[2:]] == float(value), flag
    result = json.loads((folder / "result.json").read_text())
    assert result["train_images"] == 50
    assert saved["data_path"] == here / "data"  # absolute, so that it is found from anywhere
    assert result["test"]["images"] == 20


def test_defaults_are_the_reference_preset_named_by_the_minute(
    here: Path, cifar_folder: Path
) -> None:
    small = shlex.split("--embed_dim 12 --n_attention_heads 3 --patch_size 16 --epochs 2")
    assert run_train([*small, "-lr", "0.002", "--timestamp", "2024-10-30-12-00"]) == 0
    folder = here / "output/2024-10-30-12-00"
    saved = from_json(json.loads((folder / "config.json").read_text())).flat()
    changed = {"embed_dim", "n_attention_heads", "patch_size", "epochs", "n_classes",
               "learning_rate", "model_path", "data_path"}  # fmt: skip
    expected = get_preset("reference").flat()
    assert {n for n in expected if saved[n] != expected[n]} == changed
    assert saved["learning_rate"] == 0.002
    assert [p.name for p in here.glob("model/2024-10-30-12-00/*")] == [
        "vit-layer6-32-cifar10-001.safetensors"
    ]


@pytest.mark.parametrize("mode", ["cifar", "cifar-single", "custom"])
def test_test_loads_what_train_wrote(
    mode: str, weights: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((40, 50), 90).save(here / "cat.png")
    capsys.readouterr()
    words = ["--mode", mode, "--model_path", str(weights), "--no_image", "--timestamp", "now"]
    assert run_test([*words, "--index", "5", "--image_path", "cat.png"]) == 0
    shown = capsys.readouterr().out
    if mode == "cifar":
        assert "Test acc: " in shown
        assert "Test loss: " in shown
        assert all(name in shown for name in vitrail.load(weights).classes)
        assert json.loads((here / "output/now/metrics.json").read_text())["images"] == 23
    else:
        assert "(output)" in shown
        assert "%" in shown
        assert ("dog(label)" in shown) == (mode == "cifar-single")


@pytest.mark.parametrize("mode", ["cifar", "cifar-single", "custom"])
def test_test_loads_the_references_own_weights(
    mode: str, reference: Path, cifar_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((40, 50), 90).save(here / "cat.png")
    model = str(reference / "layer3-dim32.pt")
    words = ["--mode", mode, "--model_path", model, "--no_image", "--image_path", "cat.png"]
    assert run_test(words) == 0
    assert capsys.readouterr().out


def test_flags_of_the_architecture_must_match_the_file(
    weights: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save(here / "cat.png")
    words = ["--mode", "custom", "--image_path", "cat.png", "--model_path", str(weights)]
    right = shlex.split(
        "--image_size 32 --n_channels 3 --patch_size 8 --n_classes 10 --embed_dim 12 "
        "--n_layers 1 --n_attention_heads 3 --forward_mul 2 --dropout 0.1"
    )
    assert run_test([*words, *right]) == 0
    assert "--n_layers is 6, but" in wrong([*words, "--n_layers", "6"], capsys)
    assert "3 attention heads, not 4" in wrong([*words, "--n_attention_heads", "4"], capsys)


@pytest.mark.parametrize("mode", ["cifar", "cifar-single", "custom"])
def test_without_a_model_and_runs_the_bundled_reference_is_used(
    mode: str, cifar_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((40, 50), 90).save(here / "cat.png")
    words = ["--mode", mode, "--no_image", "--output_path", "empty", "--image_path", "cat.png"]
    assert run_test(words) == 0
    assert "using the bundled model, reference" in capsys.readouterr().err


def test_without_a_model_the_newest_run_is_used(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_test(["--mode", "cifar-single", "--no_image"]) == 0
    assert "newest run, output/a" in capsys.readouterr().err


def test_one_image_is_logged_as_a_use_of_the_test_split_in_the_run(
    weights: Path, here: Path
) -> None:
    log = here / "output/a/test_uses.jsonl"
    before = len(log.read_text().splitlines())
    words = ["--mode", "cifar-single", "--no_image", "--model_path", "output/a"]
    assert run_test([*words, "--timestamp", "now"]) == 0
    assert len(log.read_text().splitlines()) == before + 1
    assert not (here / "output/now/test_uses.jsonl").exists()


def test_a_folder_that_cannot_be_created_is_one_line(
    weights: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").touch()
    words = ["--mode", "cifar-single", "--no_image", "--model_path", str(weights)]
    assert "cannot be written" in wrong([*words, "--output_path", "file"], capsys)


def test_invalid_counts_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "batch_size is 0" in wrong(["--batch_size", "0"], capsys)
    assert "index is -1" in wrong(["--mode", "cifar-single", "--index", "-1"], capsys)
    assert "num_workers is -1" in wrong(["--num_workers", "-1"], capsys)


def test_zero_workers_are_accepted_as_in_the_reference(weights: Path, here: Path) -> None:
    words = ["--model_path", str(weights), "--no_image", "--num_workers", "0"]
    assert run_test([*words, "--num_test_images", "5"]) == 0
    assert get_preset("reference").data.num_workers == 2
    assert from_json({"data": {"num_workers": 0}}).data.num_workers == 0


def test_unsupported_test_modes_are_one_line(
    weights: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model_path", str(weights)]
    assert "--image_path" in wrong([*model, "--mode", "custom"], capsys)
    assert "no.png" in wrong([*model, "--mode", "custom", "--image_path", "no.png"], capsys)
    assert "give 0 to 22" in wrong([*model, "--mode", "cifar-single", "--index", "23"], capsys)
    assert "cifar-single" in wrong([*model, "--mode", "single"], capsys)


def test_a_picture_is_shown_only_if_there_is_a_screen(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(ImageShow, "show", lambda image, title: shown.append(title) or True)
    words = ["--mode", "cifar-single", "--model_path", str(weights)]
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert run_test(words) == 0
    assert shown == []
    assert "no screen" in capsys.readouterr().err
    monkeypatch.setenv("DISPLAY", ":0")
    assert run_test(words) == 0
    assert shown == ["test-1.png"]
    assert run_test([*words, "--no_image"]) == 0
    assert len(shown) == 1


def test_the_scripts_at_the_root_pass_their_arguments_on(here: Path, cifar_folder: Path) -> None:
    words = [*SMALL, "--num_train_images", "20", "--folder_name", "root", "--device", "cpu"]
    train = [sys.executable, ROOT / "train.py", *words]
    assert subprocess.run(train, check=False, capture_output=True).returncode == 0
    test = [sys.executable, ROOT / "test.py", "--mode", "nothing"]
    done = subprocess.run(test, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_mixed_spellings(here: Path, cifar_folder: Path) -> None:
    words = [*SMALL, "-lr=0.01", "--num-train-images=20", "--timestamp=x", "--model-path", "w"]
    assert run_train(words) == 0
    saved = json.loads((here / "output/x/config.json").read_text())
    assert saved["training"]["learning_rate"] == 0.01
    assert (here / "w/x").is_dir()


def test_a_model_of_many_classes_is_loaded_from_the_references_layout(
    here: Path, reference: Path
) -> None:
    state = torch.load(reference / "layer3-dim32.pt", weights_only=True)
    state["classifier.fc2.weight"] = torch.randn(13, 32)
    state["classifier.fc2.bias"] = torch.randn(13)
    torch.save(state, here / "other.pt")
    assert vitrail.load("other.pt", device="cpu").classes[12] == "class 12"
