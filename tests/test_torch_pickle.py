"""Checkpoints of training programs: nested, with prefixes, with other content, in old formats."""

import argparse
import collections
import pathlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vitrail
from layouts import make_state
from vitrail.errors import CheckpointError


def timm() -> dict[str, Tensor]:
    """A state dict of timm's."""
    return make_state("timm")


def prefixed(prefix: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state dict with something before every name."""
    return {prefix + key: tensor for key, tensor in (state or timm()).items()}


def other() -> dict[str, Tensor]:
    """Other weights under the same names, which must not be used."""
    return {key: tensor + 1 for key, tensor in timm().items()}


def loaded(path: Path) -> vitrail.Classifier:
    """The model of a file of layouts.py's timm weights."""
    return vitrail.load(path, n_attention_heads=3, device="cpu")


def same_as_plain(classifier: vitrail.Classifier, tmp_path: Path) -> bool:
    """Whether these are the weights of ``timm()`` and no others."""
    save_file(timm(), tmp_path / "plain.safetensors")
    plain = loaded(tmp_path / "plain.safetensors").model.state_dict()
    return all(torch.equal(t, plain[k]) for k, t in classifier.model.state_dict().items())


LIGHTNING = ("lightning_fabric", "utilities", "data")
"""The module of Lightning's hyperparameters, without Lightning."""
EXTRA = {"loss.weight": torch.ones(3), "val_acc.total": torch.ones(1, dtype=torch.int64)}
WRAPPED: list[tuple[str, Any, str]] = [
    ("compiled", prefixed("_orig_mod."), "_orig_mod. removed"),
    ("blocks", {k.replace("blocks.0.", "blocks.0._orig_mod."): t for k, t in timm().items()},
     "_orig_mod. removed"),
    ("parallel", prefixed("module."), "module. removed"),
    ("lightning", {"state_dict": prefixed("model._orig_mod.") | EXTRA, "epoch": 3},
     "model. removed"),
    ("net", {"net": prefixed("net."), "acc": 91.2, "epoch": 3}, "net. removed"),
    ("backbone", {"state_dict": prefixed("backbone.") | EXTRA}, "ignored, not under backbone."),
    ("dino", {"student": prefixed("module.backbone.", other()),
              "teacher": prefixed("backbone.") | {"head.mlp.0.weight": torch.ones(2, 2)},
              "args": argparse.Namespace(arch="vit_small", lr=0.1)}, "teacher is used"),
    ("ema", {"state_dict": other(), "state_dict_ema": timm(), "arch": "vit"},
     "state_dict_ema is used; ignored in the same file: state_dict"),
    ("deit", {"model": other(), "model_ema": timm(), "optimizer": {"state": {}}},
     "model_ema is used; ignored in the same file: model"),
    ("flat", prefixed("student.", other()) | prefixed("teacher."), "teacher. removed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"), [row[1:] for row in WRAPPED], ids=[r[0] for r in WRAPPED]
)
@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.pth.tar"])
def test_nested_weights_are_found_and_noted(
    tmp_path: Path, content: Any, words: str, name: str
) -> None:
    torch.save(content, tmp_path / name)
    classifier = loaded(tmp_path / name)
    assert same_as_plain(classifier, tmp_path)
    assert any(words in note for note in classifier.notes), classifier.notes


def test_prefixes_in_safetensors_are_removed(tmp_path: Path) -> None:
    save_file(prefixed("_orig_mod."), tmp_path / "a.safetensors")
    assert same_as_plain(loaded(tmp_path / "a.safetensors"), tmp_path)


def test_plain_weights_have_no_such_note(tmp_path: Path) -> None:
    torch.save({"model": timm()}, tmp_path / "a.pth")
    notes = loaded(tmp_path / "a.pth").notes
    assert not any("removed" in note or "ignored" in note or "used" in note for note in notes)


def test_other_content_of_training_checkpoints_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [".".join(LIGHTNING[:depth]) for depth in (1, 2, 3)]
    table = type("AttributeDict", (dict,), {"__module__": names[-1]})
    for name in names:
        module = types.ModuleType(name)
        module.AttributeDict = table  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    beside = {
        "args": argparse.Namespace(data=pathlib.Path("/data"), lr=np.float64(0.1)),
        "best": np.float32(91.5), "counts": collections.defaultdict(int, a=1),
        "hyper_parameters": table(width=3), "mean": np.float64(1.5), "n": np.int64(3),
    }  # fmt: skip
    torch.save({"state_dict": timm(), **beside}, tmp_path / "a.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    assert same_as_plain(loaded(tmp_path / "a.ckpt"), tmp_path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Strange:
    """A class of the training script's own."""


REFUSED: list[tuple[Any, str]] = [
    (
        {"state_dict": {}, "config": Strange()},
        r"contains test_torch_pickle\.Strange, which could run",
    ),
    (Strange(), r"contains test_torch_pickle\.Strange, which could run"),
    ([1, 2], "not a state dict of plain tensors, but a list"),
    ({"epoch": 3}, "because of its entry 'epoch'"),
    ({}, "empty"),
]


@pytest.mark.parametrize(("content", "words"), REFUSED)
def test_unreadable_files_are_refused_with_a_remedy(
    tmp_path: Path, content: Any, words: str
) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words) as refusal:
        loaded(tmp_path / "a.pth")
    message = str(refusal.value)
    assert message.isprintable()
    assert message.endswith("torch.save(model.state_dict(), 'weights.pth')")
    assert "weights_only" not in message


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    torch.save(timm(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same_as_plain(loaded(tmp_path / "a.pth"), tmp_path)


def test_unknown_weights_under_a_known_prefix_are_still_refused(tmp_path: Path) -> None:
    torch.save({"model.layer.weight": torch.ones(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"unrecognized weights format .*keys layer\.weight"):
        loaded(tmp_path / "a.pth")
