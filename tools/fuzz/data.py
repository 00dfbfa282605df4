"""Files of data sets: pickles that would run code or never end, archives that point elsewhere."""

import dataclasses
import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np

from fuzz.engine import Target, require
from vitrail.data.cifar import (
    CIFAR10,
    CIFAR100,
    Part,
    read_batch,
    read_class_names,
    read_members,
)
from vitrail.data.cifar_pickle import load_arrays
from vitrail.data.download import file_md5


class Call:
    """Pickled, it is a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def batch(count: int = 3, labels: object = None, key: str = "labels") -> dict[object, object]:
    """Return what a batch file holds."""
    data = np.arange(count * 3072, dtype=np.uint32).astype(np.uint8).reshape(count, 3072)
    return {"data": data, key: list(range(count)) if labels is None else labels}


def attack_pickle(data: bytes, folder: Path) -> None:
    """Read a batch of either data set, its class names, or the bare pickle."""
    kind, part = data[:1], Part("a batch", data[1:], "0" * 32)
    if kind in (b"a", b"b"):
        archive = CIFAR10 if kind == b"a" else CIFAR100
        raw_BCHW, labels_B = read_batch(part, archive)
        require(raw_BCHW.shape == (len(labels_B), 3, 32, 32), f"read as {raw_BCHW.shape}")
        require(0 <= labels_B.min() <= labels_B.max() < archive.n_classes, "a label out of range")
        require(raw_BCHW.nbytes <= len(data), "more pixels than bytes")
    elif kind == b"c":
        names = read_class_names(part, CIFAR100)
        require(len(names) == 100 and all(type(name) is str for name in names), f"{names!r:.99}")
    else:
        load_arrays(part.content, part.where)


def pickle_seeds() -> list[bytes]:
    """Return sound pickles of every protocol, and hostile ones."""
    sound = [
        batch(),
        batch(2, key="fine_labels"),
        {"fine_label_names": [f"c{i}" for i in range(100)]},
        {b"data": np.ones((2, 3), np.float32), b"names": ["a", b"\xff"], 3: (1.5, None, True)},
    ]
    wrong = [
        batch(3, [0, 1]),
        batch(1, [10]),
        batch(1, [-1]),
        batch(1, [True]),
        batch(1, "a"),
        {},
        [],
        batch(1, [10**400]),
        {"data": np.array(["a"], object), "labels": []},
    ]
    evil = [
        Call(os.mkdir, "../ran"),
        Call(os.system, "touch ../ran"),
        Call(eval, "1"),
        {"data": Call(np.ndarray, (1 << 40,), "u1")},
        Call(bytearray, 1 << 40),
        Call(np.dtype, "u1,(9999,9999)u1"),
        Call(np.load, "../x"),
    ]
    kinds = (b"a", b"b", b"c", b"d")
    found = [
        kinds[index % 4] + pickle.dumps(value, protocol)
        for protocol in range(6)
        for index, value in enumerate(sound)
    ]
    found += [kind + pickle.dumps(value, 2) for kind in (b"a", b"d") for value in (*wrong, *evil)]
    nested = b"K\x01" + b"2\x86" * 60  # a tuple that holds itself twice, 60 times over
    return found + [
        b"d" + case
        for case in (
            b"\x80\x02}" + nested + b"K\x01s.",
            b"\x80\x02(" + nested + b"K\x01d.",
            b"\x80\x04(" + nested + b"\x91.",
            b"\x80\x04\x8f(" + nested + b"\x90.",
            b"(" * 50_000 + b".",
            b"\x80\x02]r\xff\xff\xff\x7f.",
            b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.",
            b"\x80\x05\x8e" + (1 << 40).to_bytes(8, "little") + b".",
            b"\x80\x02" + b"]" * 99_999 + b".",
            b"\x8a\xff" + bytes(255) + b".",
            b"I" + b"9" * 9_000 + b"\n.",
            b"ios\nmkdir\n(S'../ran'\no.",
            b"cnumpy\ndtype\n(S'u1'\ntR}S'a'\nI1\nsb.",
            b"c_codecs\nencode\n}S'__doc__'\nI1\nsb.",
        )
    ]


def attack_tar(data: bytes, folder: Path) -> None:
    """Read an archive that says it is the official one; what is not packed is packed here."""
    path = folder / CIFAR10.tar
    packed = data if data.startswith(b"\x1f\x8b") else gzip.compress(data, 1)
    path.write_bytes(packed)
    archive = dataclasses.replace(CIFAR10, tar_md5=file_md5(path))
    parts = read_members(archive, path, ("test_batch",))
    require(list(parts) == ["test_batch"], f"read {list(parts)}")
    require(os.listdir(folder) == [CIFAR10.tar], f"made {os.listdir(folder)}")  # noqa: PTH208


def tar_seeds() -> list[bytes]:
    """Return archives with members of every kind and name."""
    name = f"{CIFAR10.folder}/test_batch"
    content = pickle.dumps(batch(1), 2)
    plain = (name, tarfile.REGTYPE, "", content)
    members = [
        [plain],
        [(name, tarfile.SYMTYPE, "/etc/passwd", b"")],
        [(name, tarfile.LNKTYPE, name, b"")],
        [(name, tarfile.SYMTYPE, "../../x", b""), plain],
        [(name, tarfile.CHRTYPE, "", b"")],
        [("../../ran", tarfile.REGTYPE, "", b"x"), plain],
        [("/ran", tarfile.DIRTYPE, "", b""), plain],
        [(name, tarfile.FIFOTYPE, "", b"")],
        [(name, tarfile.DIRTYPE, "", b"")],
        [],
        [("x" * 300, tarfile.REGTYPE, "", b"x"), plain],
        [("\x1b[31m\n", tarfile.REGTYPE, "", b""), plain],
    ]
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    found = []
    for group in members:
        for form in forms:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=form) as opened:
                for path, kind, link, body in group:
                    member = tarfile.TarInfo(path[:90] if form == tarfile.USTAR_FORMAT else path)
                    member.type, member.linkname, member.size = kind, link, len(body)
                    opened.addfile(member, io.BytesIO(body))
            found.append(file.getvalue().rstrip(b"\0") + bytes(1024))
    return [*found, gzip.compress(found[0]), gzip.compress(bytes(50_000_000)), b"", b"\x1f\x8b\x08"]


PICKLES = Target("pickles", pickle_seeds, attack_pickle)
ARCHIVES = Target("archives", tar_seeds, attack_tar)
