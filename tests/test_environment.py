"""What env.json says of a machine, and what it keeps to itself."""

import json
import sys

import pytest
import torch

from vitrail.runtime.environment import HIDDEN, describe_environment, public_words


def test_paths_and_names_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "train", "--preset", "quick", "--data_path", "/home/alice/secret", "--folder_name",
        "alice-1", "--output_path=alice", "--config", "alice.toml", "--init", "hf:alice/vit",
        "--epochs", "3", "--resume", "alice", "--model_name", "alice", r"C:\Users\alice", "~alice",
        "--mean", "0.5", "0.5", "0.5", "--init=alice", "--wandb",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["/home/alice/bin/vitrail", *words])
    about = describe_environment(torch.device("cpu"), "float32")
    assert "alice" not in json.dumps(about)
    command = about["command"]
    assert command[:5] == ["vitrail", "train", "--preset", "quick", "--data_path"]
    assert command.count(HIDDEN) == 8
    assert f"--output_path={HIDDEN}" in command
    assert command[command.index("--mean") + 1 :][:3] == ["0.5"] * 3


def test_numbers_and_choices_stay() -> None:
    words = ["train", "--preset", "fast", "--epochs", "6", "--optimizer=muon", "--no-flip"]
    assert public_words(words) == words
