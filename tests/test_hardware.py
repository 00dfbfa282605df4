"""Number formats of processors; what env.json contains, without private paths or names."""

import json
import sys

import pytest
import torch

from vitrail.runtime.hardware import (
    HIDDEN,
    choose_precision,
    describe_environment,
    multiplies_bfloat16,
    public_words,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"neon": True}, False),
    ],
)
def test_bfloat16_is_for_processors_that_are_faster_with_it(
    found: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert multiplies_bfloat16(CPU) is expected
    assert choose_precision("auto", CPU) == (torch.bfloat16 if expected else torch.float32)
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("float32", CPU) == torch.float32


def test_mps_computes_in_float32() -> None:
    assert choose_precision("auto", torch.device("mps")) == torch.float32


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
