"""CIFAR-10 and CIFAR-100 from tiny folders and archives in the official format."""

import dataclasses
import hashlib
import io
import logging
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pooch
import pytest

from vitrail.data import cifar
from vitrail.data.cifar import CIFAR10_CLASSES, load_cifar
from vitrail.errors import DataError

N = {"data_batch_1": 7, "data_batch_2": 5, "data_batch_3": 3, "data_batch_4": 2, "data_batch_5": 1,
     "test_batch": 4, "train": 13, "test": 9}  # fmt: skip


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Pickles text and bytes as Python 2 did, which wrote the official files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, text: str | bytes) -> None:
        content = text.encode("latin1") if isinstance(text, str) else text
        short = len(content) < 256
        size = len(content).to_bytes(1 if short else 4, "little")
        self.write((b"U" if short else b"T") + size + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def python_2(content: object) -> bytes:
    """Pickle as Python 2 and NumPy 1 did."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def batch(file: str, classes: int, key: str) -> dict[str, Any]:
    """The content of one file: images of noise."""
    data = np.random.default_rng(N[file]).integers(0, 256, (N[file], 3072), dtype=np.uint8)
    labels = [index * 3 % classes for index in range(N[file])]
    return {"batch_label": file, key: labels, "data": data}


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """Tiny official files; their checksums are made the official ones. No mirrors, empty cache."""
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    official = {}
    for name, archive in cifar.ARCHIVES.items():
        files = {
            file: python_2(batch(file, archive.n_classes, archive.label_key))
            for file in (*archive.train, *archive.test)
        }
        if archive.meta:
            fine = [f"class {number}" for number in range(100)]
            files["meta"] = python_2({"fine_label_names": fine})
        changed = dataclasses.replace(
            archive,
            urls=(),
            tar_md5=hashlib.md5(archive_of(archive.folder, files)).hexdigest(),
            **{
                part: {
                    file: hashlib.md5(files[file]).hexdigest() for file in getattr(archive, part)
                }
                for part in ("train", "test", "meta")
            },
        )
        monkeypatch.setitem(cifar.ARCHIVES, name, changed)
        official[name] = files
    return official


def archive_of(folder: str, files: dict[str, bytes]) -> bytes:
    """The tar.gz of the files, without times."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = packed.getvalue()
    return content[:4] + bytes(4) + content[8:]  # gzip writes the time there


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def expected(archive: str, files: dict[str, str]) -> tuple[np.ndarray, list[int]]:
    about = cifar.ARCHIVES[archive]
    batches = [batch(file, about.n_classes, about.label_key) for file in files]
    raw_BCHW = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)
    return raw_BCHW, [label for b in batches for label in b[about.label_key]]


def in_folder(tmp_path: Path, folder: str, files: dict[str, bytes]) -> Path:
    return write(tmp_path / "data" / folder, files).parent


def as_folder(tmp_path: Path, folder: str, files: dict[str, bytes]) -> Path:
    return write(tmp_path / "anything", files)


def in_archive(tmp_path: Path, folder: str, files: dict[str, bytes]) -> Path:
    tar = {"cifar-10-batches-py": "cifar-10-python.tar.gz"}.get(folder, f"{folder}.tar.gz")
    return write(tmp_path / "data", {tar: archive_of(folder, files)})


def in_cache(tmp_path: Path, folder: str, files: dict[str, bytes]) -> Path:
    write(tmp_path / "cache" / folder, files)
    return tmp_path / "data"


def archive_in_cache(tmp_path: Path, folder: str, files: dict[str, bytes]) -> Path:
    in_archive(tmp_path, folder, files).rename(tmp_path / "cache")
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("put", [in_folder, as_folder, in_archive, in_cache, archive_in_cache])
def test_finds_and_reads_the_official_files(
    name: cifar.Name,
    put: Callable[..., Path],
    tiny: dict[str, dict[str, bytes]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    archive = cifar.ARCHIVES[name]
    data_path = put(tmp_path, archive.folder, tiny[name])
    before = sorted(tmp_path.rglob("*"))
    for which, files in (("train", archive.train), ("test", archive.test)):
        images = load_cifar(name, which, data_path=data_path)
        raw_BCHW, labels = expected(name, files)
        assert np.array_equal(images.raw_BCHW.numpy(), raw_BCHW)
        assert images.labels_B.tolist() == labels
    fine = tuple(f"class {number}" for number in range(100))
    assert images.classes == (CIFAR10_CLASSES if name == "cifar10" else fine)
    assert caplog.messages == []
    assert sorted(tmp_path.rglob("*")) == before


class Mirror(BaseHTTPRequestHandler):
    """One mirror for each path."""

    content: bytes

    def do_GET(self) -> None:
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        sent = {"/wrong": self.content[:-1] + b"?", "/cut": self.content[:99]}
        self.wfile.write(sent.get(self.path, self.content))

    def log_message(self, format: str, *words: object) -> None:
        pass


@pytest.fixture
def site(tiny: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """The address of the mirrors."""
    Mirror.content = archive_of("cifar-10-batches-py", tiny["cifar10"])
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def use_mirrors(monkeypatch: pytest.MonkeyPatch, *urls: str) -> None:
    changed = dataclasses.replace(cifar.ARCHIVES["cifar10"], urls=urls)
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", changed)


def test_downloads_into_the_cache_from_the_first_mirror_that_works(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, *(f"{site}/{path}" for path in ("gone", "cut", "wrong", "good")))
    assert len(load_cifar("cifar10", "train", data_path=tmp_path / "data")) == 18
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cifar-10-python.tar.gz"]
    assert (tmp_path / "cache" / "cifar-10-python.tar.gz").read_bytes() == Mirror.content
    assert not (tmp_path / "data").exists()


def test_reports_every_mirror_that_was_tried(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, *(f"{site}/{path}" for path in ("gone", "cut", "wrong")))
    with pytest.raises(
        DataError, match=r"/gone \(HTTP 404\), .*/cut \(Chunk.*/wrong \(wrong checks"
    ):
        load_cifar("cifar10", "train", data_path=tmp_path / "data")
    assert list((tmp_path / "cache").iterdir()) == []


def test_reports_a_cache_that_cannot_be_written(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, f"{site}/good")
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: cannot be written: "):
        load_cifar("cifar10", "train", data_path=tmp_path / "data")


def test_explains_what_to_do_if_the_download_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mirrors(monkeypatch, *("http://127.0.0.1:1/x",) * 3)
    with pytest.raises(DataError) as refused:
        load_cifar("cifar10", "test", data_path=Path("nowhere"))
    message = str(refused.value)
    assert message.startswith("no cifar-10-batches-py or cifar-10-python.tar.gz in nowhere or ")
    assert "http://127.0.0.1:1/x (ConnectionError)" in message
    assert message.endswith("Put either into nowhere (vitrail train --preset quick needs no data)")
    assert "\n" not in message


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_reads_files_pickled_again_and_notes_it(
    name: cifar.Name,
    protocol: int,
    tiny: dict[str, dict[str, bytes]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    archive = cifar.ARCHIVES[name]
    again = {
        file: pickle.dumps(pickle.loads(content, encoding="bytes"), protocol=protocol)
        for file, content in tiny[name].items()
    }
    with caplog.at_level(logging.WARNING, "vitrail"):
        images = load_cifar(name, "test", data_path=in_folder(tmp_path, archive.folder, again))
    raw_BCHW, labels = expected(name, archive.test)
    assert np.array_equal(images.raw_BCHW.numpy(), raw_BCHW)
    assert images.labels_B.tolist() == labels
    assert images.classes[:3] in (("plane", "car", "bird"), ("class 0", "class 1", "class 2"))
    said = "not the official file (its MD5 differs); it is used anyway"
    assert [message.endswith(said) for message in caplog.messages] == [True] * len(caplog.messages)
    assert len(caplog.messages) == len(archive.test | archive.meta)


def test_an_official_file_is_corrupt_where_it_is_truncated(
    tiny: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    valid = tiny["cifar10"]["data_batch_3"]
    for length in range(0, len(valid), 99):
        files = tiny["cifar10"] | {"data_batch_3": valid[:length]}
        data_path = in_folder(tmp_path, "cifar-10-batches-py", files)
        with pytest.raises(DataError, match=r"/data_batch_3: corrupt: .*; delete the dataset to "):
            load_cifar("cifar10", "train", data_path=data_path)
        assert len(load_cifar("cifar10", "test", data_path=data_path)) == 4


DATA = np.zeros((3, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        {"data": DATA},
        {"data": DATA, "labels": [1, 2]},
        {"data": DATA, "labels": [1, 2, 10]},
        {"data": DATA, "labels": [1, 2, -1]},
        {"data": DATA, "labels": [1, 2, 2.5]},
        {"data": DATA, "labels": "123"},
        {"data": DATA[:0], "labels": []},
        {"data": DATA[:, 1:], "labels": [1, 2, 3]},
        {"data": DATA.astype(np.int16), "labels": [1, 2, 3]},
        {"data": DATA.reshape(3, 3, 32, 32), "labels": [1, 2, 3]},
        {"data": DATA.tolist(), "labels": [1, 2, 3]},
        {},
        [DATA, [1, 2, 3]],
    ],
)
def test_refuses_other_content(content: object, tmp_path: Path) -> None:
    files = {"test_batch": pickle.dumps(content)}
    with pytest.raises(DataError, match=r"/test_batch: corrupt: (it does not hold|.*no attribute)"):
        load_cifar("cifar10", "test", data_path=as_folder(tmp_path, "", files))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_refuses_a_file_that_would_run_code(protocol: int, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    evil = pickle.dumps({"data": Evil()}, protocol)
    with pytest.raises(DataError, match=r"/test_batch: refused: it would run \w+\.mkdir, which no"):
        load_cifar("cifar10", "test", data_path=as_folder(tmp_path, "", {"test_batch": evil}))
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
def test_unpickles_no_other_global(module: str, name: str, tmp_path: Path) -> None:
    def text(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    evil = {"test_batch": b"\x80\x04" + text(module) + text(name) + b"\x93."}
    with pytest.raises(DataError, match=f"would run {module}.{name}, which"):
        load_cifar("cifar10", "test", data_path=as_folder(tmp_path, "", evil))


def test_refuses_an_archive_with_another_checksum(
    tiny: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    data_path = in_archive(tmp_path, "cifar-10-batches-py", tiny["cifar10"] | {"more": b""})
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: wrong checksum: not the "):
        load_cifar("cifar10", "test", data_path=data_path)


def test_names_the_missing_file_of_a_folder(
    tiny: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    data_path = in_folder(tmp_path, "cifar-10-batches-py", tiny["cifar10"])
    (data_path / "cifar-10-batches-py" / "test_batch").unlink()
    for part in ("train", "test"):  # a run needs both, and must report it at the start
        with pytest.raises(DataError, match=r"cifar-10-batches-py/test_batch: no such file"):
            load_cifar("cifar10", part, data_path=data_path)  # type: ignore[arg-type]
