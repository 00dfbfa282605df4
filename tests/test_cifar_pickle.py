"""Untrusted pickles."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from vitrail.data.cifar_pickle import load_arrays
from vitrail.errors import DataError

CONTENT = {"data": np.arange(35, dtype=np.uint8).reshape(5, 7), b"names": ["a", b"\xff"], 3: (1.5,)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_arrays_and_plain_containers_of_every_protocol(protocol: int) -> None:
    loaded = load_arrays(pickle.dumps(CONTENT, protocol=protocol), "a file")
    assert np.array_equal(loaded.pop("data"), CONTENT["data"])
    assert loaded == {b"names": ["a", b"\xff"], 3: (1.5,)}


def test_reads_what_numpy_1_wrote() -> None:
    new = pickle.dumps(CONTENT["data"], protocol=0)
    assert b"numpy._core" in new
    old = new.replace(b"numpy._core", b"numpy.core")
    assert np.array_equal(load_arrays(old, "a file"), CONTENT["data"])


class Call:
    """Pickled, it is a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_runs_nothing(protocol: int, tmp_path: Path) -> None:
    evil = pickle.dumps({"data": Call(os.mkdir, str(tmp_path / "made"))}, protocol=protocol)
    with pytest.raises(DataError, match=r"^batch 1: refused: it would run \w+\.mkdir, which"):
        load_arrays(evil, "batch 1")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("numpy", "core.os.system"),
        ("numpy", "dtype.__class__"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "decode"),
    ],
)
def test_allows_no_other_global(module: str, name: str) -> None:
    def text(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    with pytest.raises(DataError, match=f"would run {module}.{name}, which"):
        load_arrays(b"\x80\x04" + text(module) + text(name) + b"\x93.", "a file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04](K\x01" + b"K\x02" * 9_000 + b"e]\x93.", "corrupt"),  # two lists
        (b"cos\n" + b"x" * 9_000 + b"\n.", "it would run os.x+, which"),
    ],
)
def test_a_refusal_is_short(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        load_arrays(content, "a file")
    assert len(str(refused.value)) < 200


def test_encodes_to_latin1_only() -> None:
    evil = pickle.dumps(Call(pickle.codecs.encode, "text", "rot13"), protocol=2)
    with pytest.raises(DataError, match=r"^a file: corrupt: not a complete pickle \(ValueError\)$"):
        load_arrays(evil, "a file")


def test_every_truncation_is_refused() -> None:
    complete = pickle.dumps(CONTENT, protocol=2)
    cuts = [complete[:length] for length in range(len(complete))]
    for content in cuts:
        with pytest.raises(DataError, match=r"^a file: corrupt: not a complete pickle"):
            load_arrays(content, "a file")
