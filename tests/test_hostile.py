"""Hostile input: faults that fuzzing found; a few cases of every target (slow)."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import __main__ as fuzz
from fuzz import names as hostile_names
from fuzz import pictures as hostile_pictures
from fuzz import weights as hostile_weights
from fuzz.engine import FaultError, Target, mutate, require_in_time, run_case
from vitrail.cli import guarded
from vitrail.cli import predict as cli_predict
from vitrail.config.files import from_json, read_json, read_toml
from vitrail.config.settings import Config, DataConfig
from vitrail.data.datasets import load_data
from vitrail.data.pictures import read_picture
from vitrail.errors import CheckpointError, ConfigError, DataError, PictureError, VitrailError
from vitrail.evaluation.report import drawable
from vitrail.inference.predictions import Prediction
from vitrail.runtime.files import write_json
from vitrail.training.run_folder import read_rows
from vitrail.training.state import TrainingState
from vitrail.weights import pretrained
from vitrail.weights.checkpoint import (
    CheckpointInfo,
    load_weights_file,
    read_pointer,
    save_weights_file,
)

CHANGES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 65_535), st.integers(0, 255)), max_size=6
)
SMALL = 4_000
"""Larger seeds are tried by ``make fuzz`` only."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow's, about corrupt files
@pytest.mark.parametrize("name", fuzz.MODULES)
def test_input_is_accepted_or_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fuzz.find_target(name)
    valid, *others = target.seeds()
    seeds = [valid, *(seed for seed in others if len(seed) <= SMALL)]
    (tmp_path / "given").mkdir()
    monkeypatch.chdir(tmp_path / "given")
    assert run_case(target, valid, tmp_path), "the first seed is valid"

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(seeds), CHANGES)
    def check(seed: bytes, changes: list[tuple[int, int, int]]) -> None:
        with require_in_time():
            run_case(target, mutate(seed, changes, seeds), tmp_path)

    check()


def test_the_engine_detects_faults(tmp_path: Path) -> None:
    def traceback(_data: bytes, _folder: Path) -> None:
        raise ValueError

    def outside(_data: bytes, folder: Path) -> None:
        (folder / ".." / "ran").mkdir()

    def lines(_data: bytes, _folder: Path) -> None:
        error = VitrailError("x")
        error.args = ("two\nlines",)
        raise error

    def endless(_data: bytes, _folder: Path) -> None:
        while True:
            pass

    (tmp_path / "given").mkdir()
    for attack, seen in ((traceback, ValueError), (lines, FaultError), (outside, FaultError)):
        with pytest.raises(seen):
            run_case(Target("x", list, attack), b"", tmp_path)
    with pytest.raises(FaultError, match="more than"), require_in_time(0.01):
        endless(b"", tmp_path)


# Faults that fuzzing found.


@pytest.mark.parametrize(
    "text",
    [
        "seed = 0x" + "f" * 9_000,
        "seed = " + "9" * 9_000,
        "a = " + "[" * 5_000,
        "forward_mul = inf",
        "learning_rate = 1e999",
        "mean = [inf, 0.5, 0.5]",
        "std = [0.5, nan, 0.5]",
        "n_layers = 10_000_000_000",
        'data_path = "\\u0000"',
        ".".join(["a"] * 9_900) + " = 1",
        'folder_name = ".."',
    ],
    ids=range(11),
)
def test_invalid_toml_is_refused_in_time(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with require_in_time(), pytest.raises(ConfigError):
        read_toml(path, Config())


@pytest.mark.parametrize(
    "text", ["9" * 9_000, '{"run": {"seed": ' + "9" * 9_000 + "}}", " " * 200_000]
)
def test_invalid_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        from_json(read_json(path))


def test_settings_that_are_not_finite_or_too_large_are_refused() -> None:
    wrong: list[dict[str, dict[str, Any]]] = [
        {"model": {"forward_mul": float("inf")}},
        {"model": {"image_size": 1 << 40, "patch_size": 1}},
        {"model": {"image_size": 4096, "patch_size": 4}},
        {"data": {"std": [1e-300] * 3}},
        {"data": {"mean": [float("nan")] * 3}},
        {"training": {"batch_size": 1 << 62}},
        {"run": {"seed": 1 << 63}},
        {"run": {"model_name": "\ud800"}},
        {"data": {"data_path": "a\0"}},
    ]
    for sections in wrong:
        with pytest.raises(ConfigError):
            from_json(sections)


def test_an_error_is_one_line_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(words: Sequence[str]) -> int:
        raise DataError("/tmp/\x1b[31mred\n.png: \u202egnp no picture")

    assert guarded(fail, []) == 2
    assert capsys.readouterr().err == "vitrail: /tmp/�[31mred�.png: �gnp no picture\n"


def test_csv_contains_no_formula_and_no_control_character(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = [("=1+1\x1b.png", [Prediction("-1", 0.5)]), ("-", [Prediction("cat", 0.25)])]
    cli_predict.print_answers(answers, cli_predict.PredictOptions(csv=True))
    rows = capsys.readouterr().out.splitlines()[1:]
    assert rows == ["'=1+1�.png,1,'-1,0.5", "-,1,cat,0.25"]


def test_names_that_are_not_utf8_round_trip_through_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "x.json", {"classes": [name, "日本"]})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"classes": [name, "日本"]}


def test_folders_and_files_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    for folder in (b"caf\xe9", b"tea"):
        (tmp_path / os.fsdecode(folder)).mkdir()
        for name in (b"\xff.png", b"2.png"):
            path = tmp_path / os.fsdecode(folder) / os.fsdecode(name)
            path.write_bytes(hostile_names.picture())
    config = DataConfig(dataset="folder", data_path=tmp_path)
    images = load_data(config, ["train"], image_hw=(4, 4)).images["train"]
    assert sorted(map(os.fsencode, images.classes)) == [b"caf\xe9", b"tea"]


def test_a_very_long_name_is_drawn_in_time() -> None:
    with require_in_time(2.0):
        assert len(drawable("y" * 300_000, 1000)) == 1000


def test_postscript_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(PictureError, match="EPS files are not supported"):
        read_picture(hostile_pictures.RAN)


# Weights.


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A valid weights file."""
    said, weights, _ = hostile_weights.parts()
    path = tmp_path / "tiny.safetensors"
    save_weights_file(path, CheckpointInfo.from_json(said, path), weights)
    return path


def changed(path: Path, section: str, **values: object) -> Path:
    """Return a file with the same weights that claims something else."""
    said = hostile_weights.parts()[0]
    sections = {**said["config"], section: {**said["config"][section], **values}}
    path.write_bytes(hostile_weights.described({**said, "config": sections}))
    return path


def test_loading_draws_no_random_numbers_and_keeps_float32(tiny_file: Path) -> None:
    before = torch.get_rng_state()
    model = pretrained.load(tiny_file, device="cpu").model
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in hostile_weights.parts()[1].items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("position", ["rope", "sincos", "learned"])
def test_tables_are_made_on_the_cpu(position: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(
        hostile_weights.TINY, image_size=12, embed_dim=8, position=position
    )
    model = hostile_weights.VisionTransformer(config).eval()
    info = CheckpointInfo(Config(model=config), ("a", "b"), {}, {})
    save_weights_file(tmp_path / "x.safetensors", info, model.state_dict())
    loaded = pretrained.load(tmp_path / "x.safetensors", device="cpu").model
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    "values", [{"n_layers": 10**9}, {"embed_dim": 10**6}, {"n_layers": 10**6, "embed_dim": 2}]
)
def test_no_model_is_built_that_the_weights_do_not_fill(
    values: dict[str, int], tmp_path: Path
) -> None:
    with require_in_time(), pytest.raises(CheckpointError):
        pretrained.load(changed(tmp_path / "x.safetensors", "model", **values), device="cpu")


def test_outputs_that_are_not_finite_are_reported(tiny_file: Path) -> None:
    classifier = pretrained.load(tiny_file, device="cpu")
    with torch.no_grad():
        next(classifier.model.parameters())[0] = torch.nan
    picture = np.zeros((8, 8, 3), np.uint8)
    for ask in (classifier.predict, classifier.explain):
        with pytest.raises(CheckpointError, match="not finite"):
            ask(picture)


def test_a_header_without_metadata_is_refused(tmp_path: Path) -> None:
    header = b'{"__metadata__":null}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="does not describe"):
        load_weights_file(path)


def test_numbers_and_metrics_are_objects(tmp_path: Path) -> None:
    said = hostile_weights.parts()[0]
    for name in ("numbers", "metrics"):
        with pytest.raises(CheckpointError, match=name):
            CheckpointInfo.from_json({**said, name: 3}, tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 3, 4, 4).to_sparse(),
        torch.zeros(4, 3, 4, 4, device="meta"),
        torch.zeros(4, 3, 4, 4, dtype=torch.int8),
        torch.zeros(0, 3, 4, 4),
    ],
    ids=["sparse", "meta", "integers", "empty"],
)
def test_unusual_tensors_in_a_pt_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    state = {**hostile_weights.reference_state(), "embedding.conv1.weight": tensor}
    torch.save(state, tmp_path / "x.pt")
    with require_in_time(), pytest.raises(CheckpointError):
        pretrained.load(tmp_path / "x.pt", device="cpu")


@pytest.mark.parametrize("name", ["..", "x" * 999, "step-1/../../x", "step-\ud800", ""])
def test_a_pointer_names_a_checkpoint_or_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "BEST").write_bytes(name.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError):
        read_pointer(tmp_path / "run", "BEST")


@pytest.mark.parametrize("number", range(1, 6))
def test_an_npz_that_is_not_a_model_is_refused(number: int, tmp_path: Path) -> None:
    data = hostile_weights.foreign_seeds()[number]
    (tmp_path / "x.npz").write_bytes(data[1:])
    with pytest.raises(CheckpointError, match=r"x\.npz"):
        pretrained.load(tmp_path / "x.npz", device="cpu")


@pytest.mark.parametrize("row", ['{"step": 3}', "[3]", "9" * 9_000])
def test_corrupt_metrics_rows_are_refused(row: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    with pytest.raises(CheckpointError, match="corrupt"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda n, t: (n, t.new_zeros(0)), {}),
        (lambda n, t: (n + ".x", t), {}),
        (lambda n, t: (n, t.int()), {}),
        (lambda n, t: ("optimizer.0.99.step", t), {}),
        (lambda n, t: (n, t), {"step": "x"}),
        (lambda n, t: (n.replace("exp_avg", "other"), t), {}),
        (lambda n, t: (n, t), {"tally": 3}),
        (lambda n, t: (n, t), {"tally": {"loss": 0.5, "correct": 3, "images": float("inf")}}),
        (lambda n, t: (n, t), {"step": float("inf")}),
    ],
    ids=range(9),
)
def test_a_foreign_training_state_is_refused(change: Any, numbers: dict[str, Any]) -> None:
    said, weights, training = hostile_weights.parts()
    model = hostile_weights.VisionTransformer(hostile_weights.TINY)
    state = TrainingState.start(model, Config().training)
    state.restore(weights, training, said["numbers"])
    tensors = dict(change(name, tensor) for name, tensor in training.items())
    with pytest.raises(CheckpointError, match="does not match the settings"):
        state.restore(weights, tensors, {**said["numbers"], **numbers})
