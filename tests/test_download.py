"""Downloads from mirrors that break off, send wrong bytes, ignore ranges or do not answer."""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vitrail.data import download
from vitrail.data.download import fetch
from vitrail.errors import DataError, OutputError

CONTENT = bytes(value * value % 251 for value in range(9973))
MD5 = hashlib.md5(CONTENT).hexdigest()
CUT = 4001


class Mirror(BaseHTTPRequestHandler):
    """One mirror for each path; each keeps a list of the ranges it was asked for."""

    asked: list[tuple[str, str | None]]
    silence: threading.Event

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.asked.append((self.path, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if self.path == "/gone":
            self.send_error(404)
        elif self.path == "/silent":
            self.silence.wait()
        elif self.path == "/no-range":
            self.answer(CONTENT, 200)
        elif self.path == "/wrong":
            self.answer(CONTENT[:-1] + b"?", 200)
        elif start >= len(CONTENT):
            self.send_error(416)
        elif self.path == "/cut":
            self.answer(CONTENT[start:], 206 if start else 200, send=CUT)
        else:
            self.answer(CONTENT[start:], 206 if start else 200)

    def answer(self, content: bytes, status: int, send: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:send])

    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the mirrors."""
    monkeypatch.setattr(download, "BLOCK", 97)
    Mirror.asked, Mirror.silence = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Mirror.silence.set()
        server.shutdown()
        thread.join()


def test_downloads_a_file(site: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "a" / "new folder" / "set.tar.gz"
    assert fetch([f"{site}/good"], target, md5=MD5) == target
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert capsys.readouterr() == ("", f"downloading {site}/good\n")


def test_the_next_mirror_resumes(site: str, tmp_path: Path) -> None:
    target = fetch([f"{site}/cut", f"{site}/good"], tmp_path / "set", md5=MD5)
    assert target.read_bytes() == CONTENT
    (first, nothing), (second, wanted) = Mirror.asked
    assert (first, nothing, second) == ("/cut", None, "/good")
    assert 0 < int(re.findall(r"\d+", wanted)[0]) <= CUT


def test_the_next_call_resumes(site: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^set could not be downloaded; tried .*/cut \(cut off\)$"):
        fetch([f"{site}/cut"], tmp_path / "set", md5=MD5)
    partial = tmp_path / "set.part"
    assert CONTENT.startswith(partial.read_bytes())
    left = partial.stat().st_size
    assert 0 < left <= CUT
    fetch([f"{site}/good"], tmp_path / "set", md5=MD5)
    assert Mirror.asked[-1] == ("/good", f"bytes={left}-")
    assert (tmp_path / "set").read_bytes() == CONTENT


def test_starts_over_if_a_mirror_ignores_ranges(site: str, tmp_path: Path) -> None:
    (tmp_path / "set.part").write_bytes(CONTENT[:CUT])
    assert fetch([f"{site}/no-range"], tmp_path / "set", md5=MD5).read_bytes() == CONTENT
    assert Mirror.asked == [("/no-range", f"bytes={CUT}-")]


def test_a_complete_partial_file_is_used(site: str, tmp_path: Path) -> None:
    (tmp_path / "set.part").write_bytes(CONTENT)
    assert fetch([f"{site}/good"], tmp_path / "set", md5=MD5).read_bytes() == CONTENT


def test_wrong_bytes_are_discarded(site: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/wrong \(wrong checksum\)$"):
        fetch([f"{site}/wrong"], tmp_path / "set", md5=MD5)
    assert list(tmp_path.iterdir()) == []
    fetch([f"{site}/wrong", f"{site}/good"], tmp_path / "set", md5=MD5)
    assert (tmp_path / "set").read_bytes() == CONTENT


def test_reports_every_mirror_that_was_tried(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.2)
    with pytest.raises(DataError) as refused:
        fetch(
            [f"{site}/gone", f"{site}/silent", "http://127.0.0.1:1/closed", "http://a.invalid/x"],
            tmp_path / "set",
            md5=MD5,
        )
    message = str(refused.value)
    assert "/gone (answered 404), " in message
    assert "/silent (no answer in time), " in message
    assert "/closed (no connection), " in message
    assert "http://a.invalid/x (no" in message
    assert "\n" not in message


@pytest.mark.slow  # wall-clock time, on an idle machine
def test_a_silent_server_is_given_up_in_time(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.2)
    started = time.perf_counter()
    with pytest.raises(DataError):
        fetch([f"{site}/silent", "http://a.invalid/x"], tmp_path / "set", md5=MD5)
    assert time.perf_counter() - started < 2


def test_refuses_a_folder_that_cannot_be_made(site: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/set: cannot be written: "):
        fetch([f"{site}/good"], tmp_path / "file" / "set", md5=MD5)
