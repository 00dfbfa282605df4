"""Errors of the command line: one line each, with a remedy where one is known."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import COULD_NOT, UNEXPECTED, describe_error, guarded, main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in its own folder, temporary files included."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path


def raised_by(function: Callable[[], object]) -> Exception:
    """The exception that a function raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (any: that is the point)
        function()
    assert isinstance(caught.value, Exception)
    return caught.value


def end_with(error: Exception, *words: str) -> int:
    """Run a command that ends with this exception."""

    def command(words: Sequence[str]) -> int:
        raise error

    return guarded(command, ["train", *words])


KNOWN: dict[str, tuple[Callable[[], object], str]] = {
    "numpy": (lambda: np.empty((1 << 56,)), "out of memory: lower --batch_size"),
    "python": (lambda: bytearray(1 << 62), "out of memory: lower --batch_size"),
    "torch": (lambda: torch.empty(1 << 50), "tried to allocate 4503599627370496 bytes"),
    "not a folder": (lambda: Path(__file__, "x").write_text(""), "choose another place"),
    "long name": (lambda: Path("x" * 5000).write_text(""), "File name too long: choose another"),
    "import": (lambda: __import__("nothing_like_this"), "a library cannot be imported"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_failure_is_one_line_with_a_remedy_and_its_traceback_in_a_file(
    name: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    function, part = KNOWN[name]
    assert end_with(raised_by(function), "--epochs", "3") == COULD_NOT
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert part in line
    (file,) = (here / "temporary").iterdir()
    assert f"(traceback: {file})" in line
    content = file.read_text()
    assert "Traceback (most recent call last)" in content
    assert "arguments: train --epochs 3" in content


def test_memory_of_a_gpu_is_recognized() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert describe_error(error)[0].startswith("out of memory: lower --batch_size")
    error = RuntimeError("MPS backend out of memory (MPS allocated: 18.09 GB)")
    assert describe_error(error)[0].startswith("out of memory: lower")
    error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    assert describe_error(error)[0].startswith("out of memory: lower")


def test_an_unexpected_error_is_one_line_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = KeyError("a\x1b[31m\nb")
    error.add_note("resume with: vitrail train --resume output/a")
    assert end_with(error) == UNEXPECTED
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line
    assert "unexpected KeyError: " in line
    assert "; resume with: vitrail train --resume output/a (traceback: " in line
    assert end_with(ZeroDivisionError()) == UNEXPECTED
    assert "unexpected ZeroDivisionError: ZeroDivisionError" in capsys.readouterr().err


def test_the_line_is_printed_even_if_no_traceback_can_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert end_with(RuntimeError("odd")) == UNEXPECTED
    (line,) = capsys.readouterr().err.splitlines()
    assert "traceback:" not in line


def test_debug_prints_the_traceback_instead(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert end_with(RuntimeError("odd"), "--debug") == UNEXPECTED
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert not list((here / "temporary").iterdir())
    assert main(["nonsense", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert main(["nonsense"]) == 2
    assert "Traceback" not in capsys.readouterr().err


# --- standard output ------------------------------------------------------------------------------


def run(*words: str, out: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line; its standard output goes to a file if given."""
    command = [sys.executable, "-m", "vitrail", *words]
    with Path(out or os.devnull).open("wb") as file:
        return subprocess.run(
            command, stdout=file if out else subprocess.PIPE, stderr=subprocess.PIPE, check=False,
            env={**os.environ, **environment},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "flag"), [("cp1252", "--csv"), ("ascii", "--top_k=2"), ("utf-8", "--csv")]
)
def test_standard_output_takes_any_character(
    encoding: str, flag: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(content, encoding=encoding))
    Image.new("RGB", (9, 9)).save(here / "猫.png")
    assert main(["predict", "猫.png", "--model_path", "cifar10", flag]) == 0
    shown = content.getvalue().decode(encoding)
    if flag == "--csv":
        assert ("猫.png" if encoding == "utf-8" else "\\u732b.png") in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")
def test_a_full_disk_behind_standard_output_is_one_line(here: Path) -> None:
    Image.new("RGB", (9, 9)).save(here / "cat.png")
    done = run("predict", "cat.png", "--model_path", "cifar10", "--csv", out="/dev/full")
    (line,) = done.stderr.decode().splitlines()
    assert "standard output or a file: No space left on device: free some space" in line
    assert done.returncode == COULD_NOT


def test_a_closed_pipe_is_not_an_error(here: Path) -> None:
    command = [sys.executable, "-m", "vitrail", "info"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""
    assert done.returncode == COULD_NOT
