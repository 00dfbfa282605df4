"""Checkpoints: written and read, never partially written, damaged weights detected."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitrail.config.settings import Config, ModelConfig
from vitrail.errors import CheckpointError, OutputError
from vitrail.weights.checkpoint import (
    CheckpointInfo,
    load_info,
    load_training,
    load_weights,
    load_weights_file,
    read_pointer,
    save_checkpoint,
    save_weights_file,
    write_pointer,
)

INFO = CheckpointInfo(
    Config(model=ModelConfig(n_classes=2)), ("cat", "dög"), {"step": 3, "seconds": 0.1}, {"a": 1.5}
)
WEIGHTS = {"w": torch.arange(15.0).view(3, 5), "count": torch.tensor(7)}
TRAINING = {"optimizer.0.0.exp_avg": torch.ones(2, 3, dtype=torch.bfloat16)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-0000003"
    save_checkpoint(folder, INFO, weights=WEIGHTS, training=TRAINING)
    return folder


def load_all(folder: Path) -> tuple[CheckpointInfo, dict[str, Tensor], dict[str, Tensor]]:
    return load_info(folder), load_weights(folder), load_training(folder)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_round_trip(checkpoint: Path) -> None:
    info, weights, training = load_all(checkpoint)
    assert info == INFO
    assert same(weights, WEIGHTS)
    assert same(training, TRAINING)
    text = json.loads((checkpoint / "checkpoint.json").read_text())
    assert text["config"]["model"]["n_classes"] == 2
    assert not [path for path in checkpoint.parent.iterdir() if path.name.startswith(".")]


def test_saving_again_replaces_it(checkpoint: Path) -> None:
    changed = {**WEIGHTS, "w": torch.zeros(3, 5)}
    save_checkpoint(checkpoint, INFO, weights=changed, training=TRAINING)
    assert same(load_weights(checkpoint), changed)


def cut(content: bytes, _random: random.Random) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes, random_: random.Random) -> bytes:
    place = random_.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ 1 << random_.randrange(8)]) + content[place + 1 :]
    )


def empty(_content: bytes, _random: random.Random) -> bytes:
    return b""


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_every_changed_byte_is_refused_or_harmless(
    checkpoint: Path, name: str, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    if name == "checkpoint.json" and damage is flip:
        return  # a changed digit in it is not detected
    path, random_ = checkpoint / name, random.Random(5)
    valid = path.read_bytes()
    for _ in range(40 if damage is flip else 1):
        path.write_bytes(damage(valid, random_))
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_all(checkpoint)


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_all(checkpoint)


def test_a_kill_while_writing_leaves_the_old_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitrail.weights.checkpoint.write_flushed", full)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(checkpoint, INFO, weights={}, training={})
    assert same(load_weights(checkpoint), WEIGHTS)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_pointers(checkpoint: Path) -> None:
    parent = checkpoint.parent
    write_pointer(parent, "LAST", checkpoint)
    assert read_pointer(parent, "LAST") == checkpoint
    for wrong in ("", "step-0000009", "../etc", "/tmp"):
        (parent / "LAST").write_text(wrong)
        with pytest.raises(CheckpointError, match="LAST"):
            read_pointer(parent, "LAST")


def test_a_weights_file_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.safetensors"
    save_weights_file(path, INFO, WEIGHTS)
    info, weights = load_weights_file(path)
    assert info == INFO
    assert same(weights, WEIGHTS)
    valid, random_ = path.read_bytes(), random.Random(7)
    header = 8 + int.from_bytes(valid[:8], "little")
    for _ in range(60):
        path.write_bytes(valid[:header] + flip(valid[header:], random_))
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_weights_file(path)
