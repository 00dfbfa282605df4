"""The command line: what it prints, what it refuses, with which exit code."""

import csv
import dataclasses
import io
import itertools
import json
import pickle
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from vitrail.cli import COMMANDS, main
from vitrail.cli.console import out, progress_bar, waiting
from vitrail.cli.options import ModelOptions, list_pictures, name_of
from vitrail.cli.parsing import parse
from vitrail.cli.predict import describe_classes, print_table
from vitrail.cli.train import read
from vitrail.config.files import from_json, read_json, read_toml
from vitrail.config.settings import Config, ModelConfig
from vitrail.errors import ConfigError
from vitrail.inference.predictions import Prediction
from vitrail.model.vit import VisionTransformer
from vitrail.training.run_folder import lock_of
from vitrail.weights.checkpoint import CheckpointInfo, read_pointer, save_weights_file
from vitrail.weights.pretrained import load

pytestmark = pytest.mark.usefixtures("rough_plots")

TINY = shlex.split(
    "--patch_size 16 --embed_dim 8 --n_layers 1 --n_attention_heads 2 --batch_size 40 "
    "--num_train_images 80 --num_test_images 30 --validation_images 50 --device cpu"
)
"""A run of half a second."""

Runner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("runs")
    words = ["train", *TINY, "--epochs", "2", "--output_path", str(output), "--folder_name", "a"]
    assert main(words) == 0
    return output / "a"


@pytest.fixture
def weights(here: Path) -> Path:
    """A file of weights for pictures of 8 x 12, three classes."""
    config = Config(
        model=ModelConfig(
            image_size=(8, 12), patch_size=4, embed_dim=8, n_layers=1, n_attention_heads=2,
            n_classes=3,
        )
    )  # fmt: skip
    info = CheckpointInfo(config, ("cat", "d\u001b[31mog", "köttur"), {}, {})
    path = here / "model.safetensors"
    torch.manual_seed(1)
    save_weights_file(path, info, VisionTransformer(config.model).state_dict())
    return path


@pytest.fixture
def pictures(here: Path) -> Path:
    """A folder with two pictures and a broken one."""
    folder = here / "pictures"
    folder.mkdir()
    for name, side in (("a.png", 9), ("b.jpg", 30)):
        Image.effect_noise((side, side + 4), 90).convert("RGB").save(folder / name)
    (folder / "c.png").write_bytes(b"no picture")
    return folder


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    """Run a command that must fail with one line that contains these parts."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "MD5" not in line or "vitrail:" in line]
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("vitrail: ")
    for part in parts:
        assert part in lines[0]
    return lines[0]


# --- help and speed -------------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.slow  # wall-clock time, on an idle machine
def test_help_takes_half_a_second(vitrail: Runner) -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        assert vitrail("--help").returncode == 0
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--" in shown
    assert f"vitrail {command}" in shown


def test_without_arguments_the_help_is_printed_as_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "usage: vitrail" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vitrail 0.")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "info"])
def test_help_ends_with_examples_and_names_no_missing_flag(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    about, _, examples = shown.partition("\nFor example:\n")
    assert f"  vitrail {command}" in examples
    assert "-h, --help" not in examples
    assert "{None}" not in shown
    head, _, flags = about.partition("-h, --help")
    for flag in re.findall(r"--\w\w+", head + examples):
        assert flag in flags or flag == "--batch", flag  # of --batch-size


# --- train ----------------------------------------------------------------------------------------


def test_training_prints_the_result_and_what_to_try_next(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert main(["train", *TINY, "--epochs", "2", "--embed-dim", "16", "--warmup_epochs", "0"]) == 0
    captured = capsys.readouterr()
    assert "validation" in captured.out
    assert "test" in captured.out
    assert "vitrail predict output/quick" in captured.out
    assert "epoch   2/2" in captured.err
    config = json.loads((here / "output/quick/config.json").read_text())
    assert config["model"]["embed_dim"] == 16
    assert config["training"]["warmup_epochs"] == 0
    assert config["model"]["pool"] == "mean"  # the preset's


def test_a_toml_file_overrides_the_preset_and_flags_override_both(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "my.toml").write_text("embed_dim = 16\n[training]\nepochs = 1\nbatch_size = 20\n")
    words = ["train", *TINY, "--config", "my.toml", "--embed_dim", "8", "--folder_name", "x"]
    assert main(words) == 0
    config = json.loads((here / "output/x/config.json").read_text())
    assert config["model"]["embed_dim"] == 8
    assert config["training"]["epochs"] == 1
    assert config["training"]["batch_size"] == 40


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--learning_rat", "3"],
            ["unknown flag --learning_rat", "did you mean '--learning_rate'"],
        ),
        (["--preset", "quik"], ["unknown preset 'quik'", "did you mean 'quick'"]),
        (["--batch_size", "many"], ["batch"]),
        (["--pool", "max"], ["cls", "mean"]),
        (["--patch_size", "5"], ["image_size 32 is not a multiple of patch_size 5"]),
        (["--n_attention_heads", "3"], ["embed_dim 64 is not a multiple", "3"]),
        (["--warmup_epochs", "9"], ["warmup_epochs is 9", "training has"]),
        (["--n_classes", "7"], ["n_classes is 7", "10 classes"]),
        (["--dataset", "folder", "--data_path", "nowhere"], ["nowhere: no such folder"]),
        (["--output_path", "file/in/the/way"], ["file/in/the/way", "cannot be created"]),
        (["--config", "none.toml"], ["none.toml: No such file"]),
        (["--resume", "nowhere"], ["nowhere: not a run folder"]),
        (
            ["--preset", "reference", "--resume", "x"],
            ["--resume continues with the run's own settings"],
        ),
        (["word"], ["unknown argument word"]),
    ],
)
def test_invalid_training_settings_are_one_line(
    flags: list[str], parts: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").write_text("")
    refused(["train", *flags], capsys, *parts)
    assert not (here / "output/quick").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("command", [["train"], ["test"], ["predict", "a.png"]])
def test_cuda_without_cuda_is_refused(
    command: list[str], weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if command == ["train"] else ["--model_path", str(weights)]
    words = [str(pictures / w) if w == "a.png" else w for w in command]
    refused([*words, *model, "--device", "cuda"], capsys, "device cuda is not available")


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["pridict"], capsys, "unknown command 'pridict'", "did you mean 'predict'")


def test_resume_keeps_the_settings(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = ["train", "--resume", str(run_folder)]
    refused(
        [*resume, "--learning_rate", "1"], capsys, "leave out --learning_rate",
        f"start another run from its weights with --init {run_folder}",
    )  # fmt: skip
    for preset in ("quick", "fast"):
        refused([*resume, "--preset", preset], capsys, "leave out --preset and --config")


def test_resuming_a_finished_run_prints_its_result_without_another_test(
    run_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / "copy"
    shutil.copytree(run_folder, folder)
    uses, result = ((folder / name).read_bytes() for name in ("test_uses.jsonl", "result.json"))
    resume = ["train", "--resume", str(folder), "--keep_checkpoints", "2"]
    capsys.readouterr()
    assert main(resume) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"this run is finished, its result is in {folder / 'result.json'}" in printed.err
    assert (folder / "test_uses.jsonl").read_bytes() == uses
    assert (folder / "result.json").read_bytes() == result
    (folder / "result.json").unlink()  # as if it had been killed while it was tested
    assert main(resume) == 0
    assert "resuming at step 4/4" in capsys.readouterr().err
    assert len((folder / "test_uses.jsonl").read_text().splitlines()) == 2
    assert json.loads((folder / "result.json").read_text())["test"]["images"] == 30


# --- missing, corrupt or hostile data -------------------------------------------------------------


class RunsCode:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("was_run", "w")


def test_an_empty_model_path_is_not_the_newest_run(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", "--model_path", ""]) == 2
    assert "no --model_path given" not in capsys.readouterr().err


def test_a_name_that_is_too_long_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model_path", "cifar10", "x" * 3000]) == 2
    assert "another place" not in capsys.readouterr().err


def test_missing_corrupt_or_hostile_data_is_refused(
    cifar_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--dataset", "cifar10", "--data_path", str(cifar_folder.parent)]
    batch = cifar_folder / "data_batch_2"
    valid = batch.read_bytes()
    batch.write_bytes(valid[:-9])
    refused(words, capsys, "data_batch_2")
    batch.write_bytes(b"\x80\x02}q\x01(U" + valid)  # as Python 2 begins, with another checksum
    refused(words, capsys, "data_batch_2: corrupt")
    batch.write_bytes(pickle.dumps({"data": RunsCode(), "labels": []}))
    refused(words, capsys, "data_batch_2", "open")
    assert not (here / "was_run").exists()
    batch.unlink()
    refused(words, capsys, "data_batch_2: no such file")
    (cifar_folder.parent / "cifar-10-python.tar.gz").write_bytes(b"x")
    for path in cifar_folder.iterdir():
        path.unlink()
    refused(words, capsys, "cifar-10-python.tar.gz")


# --- missing, corrupt or foreign models -----------------------------------------------------------


def test_missing_corrupt_or_foreign_models_are_refused(
    run_folder: Path, weights: Path, pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(pictures / "a.png")

    def check(model: Path, *parts: str) -> None:
        refused(["predict", picture, "--model_path", str(model)], capsys, *parts)
        refused(["test", "--model_path", str(model)], capsys, *parts)
        refused(["info", str(model)], capsys, *parts)

    check(here / "nothing", "nothing: no such model")
    check(pictures / "a.png", "not a model file")
    check(pictures, "pictures")
    valid = weights.read_bytes()
    weights.write_bytes(valid[:-1])
    check(weights, "model.safetensors", "not a valid safetensors file")
    weights.write_bytes(valid[:-1] + bytes([valid[-1] ^ 1]))
    check(weights, "model.safetensors: checksum mismatch")
    torch.save({"layer.weight": torch.ones(2, 3)}, here / "foreign.pt")
    check(here / "foreign.pt", "foreign.pt: unrecognized weights format")
    (here / "code.pt").write_bytes(pickle.dumps(RunsCode()))
    check(here / "code.pt", "code.pt: not a valid weights file")
    assert not (here / "was_run").exists()
    checkpoint = read_pointer(run_folder / "checkpoints", "BEST")
    model = checkpoint / "model.safetensors"
    valid = model.read_bytes()
    model.write_bytes(valid[:-1])
    try:
        check(run_folder, "model.safetensors: checksum mismatch")
    finally:
        model.write_bytes(valid)


def test_without_a_model_the_newest_run_or_the_bundled_model_is_used_and_named(
    run_folder: Path, pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(pictures / "a.png")]) == 0
    assert "using the bundled model, cifar10" in capsys.readouterr().err
    (here / "output").symlink_to(run_folder.parent)
    assert main(["predict", str(pictures / "a.png")]) == 0
    printed = capsys.readouterr().err
    assert "using the bundled model, cifar10, since the newest run only knows shapes" in printed
    assert main(["explain", "--index", "0", "--format", "csv"]) == 0
    assert "using the newest run, output/a" in capsys.readouterr().err


def test_the_newest_run_on_photographs_is_used_for_files(
    run_folder: Path, pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_folder, here / "output/b")
    config = json.loads((run_folder / "config.json").read_text())
    config["data"]["dataset"] = "folder"
    (here / "output/b/config.json").write_text(json.dumps(config))
    assert main(["predict", str(pictures / "a.png")]) == 0
    assert "using the newest run, output/b" in capsys.readouterr().err


def test_the_model_may_be_named_before_the_pictures(
    run_folder: Path, pictures: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(pictures / "a.png")
    assert main(["predict", "cifar10", picture, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["predict", picture, "--model_path", "cifar10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert main(["explain", str(run_folder), "--index", "0", "--format", "csv"]) == 0
    capsys.readouterr()
    assert main(["predict", "cifar10", picture, "--model_path", str(run_folder)]) == 2
    assert "two models are named" in capsys.readouterr().err
    assert main(["predict", picture, "cifar10"]) == 2
    assert "cifar10 is a model, not a picture: name it first" in capsys.readouterr().err


# --- train ----------------------------------------------------------------------------------------


def test_the_conclusion_names_the_epoch_that_is_kept(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, kept in (([], "best epoch: 1"), (["--validation_images", "0"], "last epoch kept")):
        assert main(["train", *TINY, "--epochs", "1", *words]) == 0
        assert f"{kept}; curves" in " ".join(capsys.readouterr().out.split())


def test_a_plot_that_cannot_be_written_does_not_lose_the_result(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no font\nsecond line")

    monkeypatch.setattr("vitrail.evaluation.report.plot_confusion", broken)
    monkeypatch.setattr("vitrail.training.run.draw_attention", broken)
    words = ["train", *TINY, "--epochs", "1", "--folder_name", "a", "--attention_epochs", "1"]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "Try next" in shown.out
    (line,) = (line for line in shown.err.splitlines() if line.startswith("vitrail: "))
    assert line == (
        "vitrail: output/a/attention/epoch-0001.png could not be drawn: RuntimeError: no font; "
        "output/a/confusion_matrix.png could not be drawn: RuntimeError: no font; "
        "everything else is in output/a/"
    )
    for name in ("result.json", "graph_loss.png", "graph_accuracy.png", "calibration.png"):
        assert (here / "output/a" / name).stat().st_size > 100


def test_after_an_unexpected_error_the_line_says_how_to_resume(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("tempfile.tempdir", str(here))
    monkeypatch.setattr("vitrail.training.run.Run.finish", broken)
    assert main(["train", *TINY, "--epochs", "1", "--folder_name", "a"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vitrail: out of memory: ")
    assert "; resume with: vitrail train --resume output/a (traceback: " in line


def test_an_unwritable_weights_folder_is_refused_before_training(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").touch()
    refused(["train", *TINY, "--model_path", "file/models"], capsys, "file/models: cannot be wri")
    assert not list((here / "output").iterdir())
    refused(["train", *TINY, "--output_path", "file/out"], capsys, "file/out: cannot be created")


def test_weights_that_cannot_be_written_at_the_end_do_not_lose_the_result(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "models/a").mkdir(parents=True)
    (here / "models/a/w-000.safetensors").mkdir()
    words = ["train", *TINY, "--epochs", "1", "--folder_name", "a", "--model_path", "models"]
    assert main([*words, "--model_name", "w"]) == 1
    shown = capsys.readouterr().err
    assert "w-000.safetensors: cannot be written" in shown
    assert "vitrail convert output/a FILE" in shown
    assert (here / "output/a/result.json").exists()


def test_a_failed_start_leaves_no_folder_and_no_open_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[bool] = []
    real = shutil.rmtree

    def removed(folder: Path) -> None:
        locked.append(lock_of(folder).is_locked)
        real(folder)

    monkeypatch.setattr(shutil, "rmtree", removed)
    refused(["train", *TINY, "--n_classes", "7"], capsys, "n_classes is 7")
    assert locked == [False]
    assert list((here / "output").iterdir()) == []


def test_settings_with_a_byte_order_mark_from_a_run_or_the_home_folder(
    run_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    monkeypatch.setenv("USERPROFILE", str(here / "home"))
    bom = here / "bom.toml"
    bom.write_bytes(b'\xef\xbb\xbfepochs = 7\noutput_path = "~/runs"\n')
    settings = read_toml(bom, Config())
    assert settings.training.epochs == 7
    assert settings.run.output_path == here / "home/runs"
    settings = read_toml(run_folder / "config.json", Config())
    assert settings.model.embed_dim == 8
    copy = here / "config.json"
    copy.write_bytes(b"\xef\xbb\xbf" + (run_folder / "config.json").read_bytes())
    assert from_json(read_json(copy)) == from_json(read_json(run_folder / "config.json"))
    _, settings = read(["--data_path=~/pictures", "--init", ""], "vitrail train")[:2]
    assert settings.data.data_path == here / "home/pictures"


@pytest.mark.parametrize(
    ("flag", "name"),
    [("--lr", "learning_rate"), ("--lr=0.1", "learning_rate"), ("--wd", "weight_decay"),
     ("--bs", "batch_size"), ("--num-workes", "num_workers"), ("--depth", "n_layers")],
)  # fmt: skip
def test_other_names_of_flags_are_understood(
    flag: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["train", flag, "1"], capsys, f"unknown flag {flag} (did you mean '--{name}'?)")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("train --config settings.yaml", "YAML is not supported: give a TOML file"),
        ("train --stop_at_accuracy 90", "give a fraction, e.g. 0.9"),
        ("train --num_workers -1", "num_workers is -1"),
        ("test --batch_size 0", "batch_size is 0"),
        ("test --batch_size -1", "batch_size is -1"),
        ("test --num_workers -1", "num_workers is -1"),
        ("test --num_test_images 0", "num_test_images is 0"),
    ],
)
def test_invalid_numbers_and_files_are_one_line(
    words: str, part: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "settings.yaml").write_text("epochs: 3\n")
    refused(words.split(), capsys, part)


def test_a_corrupt_run_does_not_hide_the_others(
    run_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_folder, here / "output/good")
    shutil.copytree(run_folder, here / "output/bad")
    (here / "output/bad/metrics.jsonl").write_text("half a li")
    assert main(["info"]) == 1
    shown = capsys.readouterr()
    assert re.search(r"bad +│ corrupt", shown.out)
    assert re.search(r"good +│ 2 +│ +[0-9]", shown.out)
    assert "vitrail: output/bad/metrics.jsonl: corrupt" in shown.err


# --- test -----------------------------------------------------------------------------------------


def test_test_prints_tables_or_json_and_logs_the_use(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uses = len((run_folder / "test_uses.jsonl").read_text().splitlines())
    assert main(["test", "--model_path", str(run_folder)]) == 0
    shown = capsys.readouterr().out
    assert "of 2,000 images" in shown  # all, though the run itself took 30
    assert "calibration" in shown
    assert "ring" in shown
    words = ["test", "--model_path", str(run_folder), "--json"]
    assert main([*words, "--num_test_images", "30"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["images"] == 30
    saved = json.loads((run_folder / "result.json").read_text())["test"]
    assert numbers["accuracy"] == saved["accuracy"]
    assert numbers["loss"] == pytest.approx(saved["loss"])
    assert len((run_folder / "test_uses.jsonl").read_text().splitlines()) == uses + 2
    assert (run_folder / "test/confusion_matrix.png").exists()


def test_a_read_only_run_is_tested_and_its_use_logged_in_the_output(
    run_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = here / "copy"
    shutil.copytree(run_folder, copy)
    (copy / "test_uses.jsonl").unlink()
    (copy / "test_uses.jsonl").mkdir()  # so that even root cannot write it
    assert main(["test", "--model_path", str(copy), "--output_path", "mine"]) == 0
    assert "this use of the test split is logged in mine/test_uses.jsonl" in capsys.readouterr().err
    assert "vitrail test" in (here / "mine/test_uses.jsonl").read_text()
    assert (here / "mine/metrics.json").exists()


def test_a_test_prints_its_numbers_if_a_plot_cannot_be_written(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("vitrail.evaluation.report.plot_calibration", broken)
    words = ["test", "--model_path", str(run_folder), "--json", "--split", "validation"]
    assert main([*words, "--output_path", "mine"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["images"] == 50
    assert "vitrail: mine/calibration.png could not be drawn: RuntimeError: no font" in shown.err
    assert Path("mine/confusion_matrix.png").exists()


def test_evaluating_another_split_does_not_log_a_test_use(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_folder / "test_uses.jsonl").read_text()
    words = ["test", "--model_path", str(run_folder), "--split", "validation", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 50
    assert (run_folder / "test_uses.jsonl").read_text() == before


def test_data_with_other_classes_is_refused(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["test", "--model_path", str(weights), "--dataset", "shapes"]
    refused(words, capsys, "shapes has the classes")


# --- predict --------------------------------------------------------------------------------------


def test_a_broken_picture_among_many_is_reported_and_the_rest_classified(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(pictures), "--model_path", str(weights), "--top_k", "2"]
    assert main([*words, "--json"]) == 1
    captured = capsys.readouterr()
    answers = json.loads(captured.out)
    assert [Path(a["picture"]).name for a in answers] == ["a.png", "b.jpg"]
    for answer in answers:
        first, second = answer["predictions"]
        assert first["probability"] >= second["probability"] > 0
        assert {first["class"], second["class"]} < {"cat", "d\u001b[31mog", "köttur"}
    assert "c.png" in captured.err
    assert main([*words, "--csv"]) == 1
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["picture", "rank", "class", "probability"]
    assert len(rows) == 1 + 2 * 2


def test_a_table_shows_full_names_and_no_control_characters(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = pictures / f"{'long' * 30}.jpg"
    (pictures / "b.jpg").rename(long)
    assert main(["predict", str(pictures / "*.jpg"), "--model_path", str(weights)]) == 0
    shown = capsys.readouterr().out
    assert long.name in "".join(line.split(" ")[0] for line in shown.splitlines())
    assert "\u001b[31m" not in shown


@pytest.mark.parametrize("width", [40, 80, 300])
def test_classes_and_numbers_are_never_truncated(
    width: int, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.cli.predict.out.width", width)
    assert out.width == width
    words = ["predict", str(pictures / "a.png"), "--model_path", "cifar10", "--top_k", "10"]
    assert main(words) == 0
    first, *table = capsys.readouterr().out.splitlines()
    assert first == "Classes of cifar10: plane, car, bird, cat, deer, dog, frog, horse, ship, truck"
    table = list(itertools.takewhile(lambda line: "unlike" not in line, table))
    text = "\n".join(table)
    assert "…" not in text
    assert text.count("%") == 10
    for name in first.partition(": ")[2].split(", "):
        assert name in text
    assert max(map(len, table)) <= width


def test_the_table_changes_its_layout_when_columns_do_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    top = [Prediction("a long class name", 0.5), Prediction("b", 0.25), Prediction("猫", 0.25)]
    wide = []
    for width in range(30, 90):
        monkeypatch.setattr("vitrail.cli.predict.out.width", width)
        print_table([("picture.png", top), ("n" * 30, top)])
        shown = capsys.readouterr().out
        assert "…" not in shown
        assert shown.count("%") == 6
        assert max(map(cell_len, shown.splitlines())) <= width
        wide.append("1." in shown)
    # 24 for the name, then " │ a long class name 50.0%", " │ b 25.0%" and " │ 猫 25.0%".
    assert wide == [width >= 24 + 26 + 10 + 11 for width in range(30, 90)]


def test_a_model_given_as_a_picture_is_recognized(run_folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(ModelOptions, [str(run_folder)], prog="vitrail x")
    assert str(refused.value) == f"{run_folder} is a model: give --model_path {run_folder}"


def test_a_picture_folder_with_an_entry_called_checkpoints_is_no_model(
    pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "all/photos"
    shutil.copytree(pictures, folder)
    names = list_pictures([str(folder)])
    (folder / "checkpoints").mkdir()
    shutil.copy(pictures / "a.png", folder / "checkpoints/b.png")
    assert sorted(list_pictures([str(folder)])) == sorted([*names, f"{folder}/checkpoints/b.png"])
    assert sorted(list_pictures([str(tmp_path / "all")])) == sorted(list_pictures([str(folder)]))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (".", "v1.5"), ("../v1.5", "v1.5"), ("vit.b.safetensors", "vit.b"), ("a.pth.tar", "a"),
        ("hf:owner/vit-0.5", "vit-0.5"), ("hf:owner/vit@v1.0", "vit"), ("cifar10", "cifar10"),
    ],
)  # fmt: skip
def test_files_are_named_after_the_model(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "v1.5"
    folder.mkdir()
    for file in ("vit.b.safetensors", "a.pth.tar"):
        (folder / file).touch()
    monkeypatch.chdir(folder)
    assert name_of(source) == name


def test_many_classes_are_not_all_listed() -> None:
    names = tuple(f"class {number}" for number in range(1000))
    model = dataclasses.replace(load("cifar10", device="cpu"), classes=names)
    line = describe_classes(model)
    assert line.startswith("Classes of cifar10: class 0, class 1, ")
    assert line.endswith(", class 19, … (1,000 classes)")


def test_a_picture_from_standard_input(
    weights: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = io.BytesIO((pictures / "a.png").read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content))
    capsys.readouterr()
    assert main(["predict", "-", "--model_path", str(weights), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["picture"] == "-"


def test_fit_and_background_change_the_prediction(
    weights: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = np.zeros((20, 90, 4), np.uint8)
    left[:, :30, 0] = left[:, :30, 3] = 255
    Image.fromarray(left).save(here / "left.png")

    def answer(*flags: str) -> str:
        assert main(["predict", "left.png", "--model_path", str(weights), "--json", *flags]) == 0
        return capsys.readouterr().out

    answers = {answer("--fit", fit) for fit in ("crop", "pad", "squash")}
    assert len(answers) == 3
    assert answer("--background", "0", "0", "0") not in {*answers, answer()}
    assert answer() == answer("--fit", "crop")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["no picture given"]),
        (["missing.png"], ["missing.png: no such picture"]),
        (["pictures/c.png"], ["c.png"]),
        (["pictures/a.png", "--json", "--csv"], ["--json and --csv cannot be combined"]),
        (["pictures/a.png", "--top_k", "0"], ["top_k is 0"]),
        (["pictures/a.png", "--background", "0", "0", "256"], ["from 0 to 255"]),
        (["pictures/a.png", "--n_attention_heads", "4"], ["has 2 attention heads, not 4"]),
    ],
)
def test_invalid_predictions_are_one_line(
    flags: list[str], parts: list[str], weights: Path, pictures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    refused(["predict", *flags, "--model_path", str(weights)], capsys, *parts)


# --- info -----------------------------------------------------------------------------------------


def test_info_shows_presets_runs_and_models(
    run_folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--output_path", str(run_folder.parent)]) == 0
    shown = capsys.readouterr().out
    assert "reference12" in shown
    assert "torch" in shown
    assert f"{run_folder.name} " in shown
    assert re.search(rf"{run_folder.name} +│ 2 +│( +[\d.]+% +│){{3}} shapes", shown)
    assert main(["info", str(weights)]) == 0
    shown = capsys.readouterr().out
    assert "köttur" in shown
    assert "(8, 12)" in shown
    assert "class_token" not in shown  # None


def test_info_prints_json(
    run_folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--output_path", str(run_folder.parent), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["machine", "presets", "bundled", "runs"]
    (run,) = shown["runs"]
    result = json.loads((run_folder / "result.json").read_text())
    assert (run["data"], run["test"]) == ("shapes", result["test"]["accuracy"])
    assert main(["info", str(run_folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["test accuracy"] == result["test"]["accuracy"]
    assert shown["training images"] == 80
    assert shown["settings"]["model"]["embed_dim"] == 8


def test_train_prints_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--epochs", "1", "--warmup_epochs", "0", "--json"]) == 0
    (folder,) = (here / "output").iterdir()
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "result.json").read_text())


def test_a_terminal_shows_at_once_that_something_is_done(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    monkeypatch.setattr("vitrail.cli.console.err", console)
    with waiting("loading the model"):
        pass
    with progress_bar("testing", 2) as advance:
        advance(2)
    shown = screen.getvalue()
    assert "loading the model …" in shown
    assert re.search("testing.*100%", shown)
