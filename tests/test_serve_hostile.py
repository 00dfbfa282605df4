"""Hostile requests to a server that runs: broken HTTP, broken pictures, slow and wrong senders."""

import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from test_serve import bomb, picture, serving, write_model
from vitrail.config.settings import ModelConfig
from vitrail.explain.map_settings import METHODS

pytest.importorskip("uvicorn", reason="uvicorn is not installed")

CLIENTS = 8
WAIT = 60.0
GOOD, BOMB = picture(40, 30), bomb()
PARAMETERS = ["model", "step", "top", "hide", "prepared", "seen", "class", "against", "method",
              "fusion", "discard_ratio", "query", "layers", "heads", "gradients", "points",
              "resolution", "window", "passes", "tpo", ""]  # fmt: skip
VALUES = ["", "0", "-1", "1e9", "nan", "inf", "9" * 400, "\x00", "../../etc/passwd", "cat", "1,2",
          "0,0,0", "é", "🐈", "%", "a" * 3000, "attention", "all", "shapley", "true"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a hostile client sends, and how."""

    parts: list[bytes]
    pause: float = 0.0
    """Seconds between two parts."""
    leaves: bool = False
    """The client goes without waiting for an answer."""


def post(
    body: bytes, *, path: str = "predict", host: str = "127.0.0.1", headers: str = "",
    length: str | None = None,
) -> bytes:  # fmt: skip
    head = f"POST /api/{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}"
    size = str(len(body)) if length is None else length
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + body


def cut_body(dice: random.Random) -> Case:
    return Case([post(GOOD)[: dice.randrange(1, len(GOOD))]], leaves=True)


def damaged_picture(dice: random.Random) -> Case:
    damaged = bytearray(picture(dice.randrange(1, 90), 30, dice.choice(["PNG", "JPEG", "GIF"])))
    for _ in range(dice.randrange(1, 20)):
        damaged[dice.randrange(len(damaged))] = dice.randrange(256)
    return Case([post(bytes(damaged[: dice.randrange(1, len(damaged) + 1)]))])


def large_picture(dice: random.Random) -> Case:
    return Case([post(BOMB if dice.random() < 0.5 else b"\x00" * dice.randrange(1, 200_000))])


def huge_header(dice: random.Random) -> Case:
    many = "".join(f"X-{n}: {'a' * 100}\r\n" for n in range(dice.randrange(10, 2000)))
    long = f"X-Long: {'b' * dice.randrange(1000, 300_000)}\r\n"
    return Case([post(GOOD, headers=dice.choice([many, long]))], leaves=True)


def broken_http(dice: random.Random) -> Case:
    text = bytearray(post(GOOD)[:300])
    for _ in range(dice.randrange(1, 10)):
        text[dice.randrange(len(text))] = dice.randrange(256)
    noise = dice.randbytes(dice.randrange(1, 4000))
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    return Case([dice.choice([bytes(text), noise, preface])], leaves=True)


def wrong_length(dice: random.Random) -> Case:
    length = dice.choice(["-1", "x", "1e3", "9" * 30, str(10**8), "3, 4", "0", "+5", ""])
    twice = dice.choice(["", "Content-Length: 3\r\n", "Transfer-Encoding: chunked\r\n"])
    return Case([post(GOOD, length=length, headers=twice)], leaves=True)


def broken_chunks(dice: random.Random) -> Case:
    head = "POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    size = dice.choice(["zz", "-3", "ffffffffffffffff", "5;" + "x" * 9000, "5"])
    return Case([head.encode(), f"{size}\r\nabc\r\n".encode()], leaves=True)


def wrong_type(dice: random.Random) -> Case:
    words = [(dice.choice(PARAMETERS), dice.choice(VALUES)) for _ in range(dice.randrange(1, 4))]
    question = urllib.parse.urlencode(words) + dice.choice(["", "&", "&&=", "&%ff%00=1"])
    path = dice.choice(["predict", "explain", "curve"])
    return Case([post(GOOD, path=f"{path}?{question}")])


def wrong_path(dice: random.Random) -> Case:
    method = dice.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "X" * 100])
    path = dice.choice(["/", "/page/../app.py", "/page/..%2f..%2fetc%2fpasswd", "/page/%00", "*",
                        "/api/models/" + "n" * 9000, "/api/models/tiny/pictures/99999999999999",
                        "/api/models/%2e%2e", "/api/models/tiny/confusion/1/-1", "/api/predict",
                        "//etc/passwd", "/api/models/tiny/run",
                        "http://evil.example/"])  # fmt: skip
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    return Case([head.encode()])


def wrong_host(dice: random.Random) -> Case:
    host = dice.choice(["evil.example", "", "127.0.0.1.evil.example", "[::", "a" * 5000, "\x00"])
    origin = dice.choice(["", "Origin: null\r\n", "Origin: http://[\r\n", "Host: 127.0.0.1\r\n",
                          "Origin: http://evil.example\r\n"])  # fmt: skip
    return Case([post(GOOD, host=host, headers=origin)])


def wrong_origin(dice: random.Random) -> Case:
    origin = dice.choice(["null", "http://[", "http://evil.example", "file://", "", "//", "\xe9"])
    return Case([post(GOOD, headers=f"Origin: {origin}\r\n")])


def slow_sender(dice: random.Random) -> Case:
    text, step = post(GOOD), dice.randrange(50, 1000)
    parts = [text[start : start + step] for start in range(0, len(text), step)][:4]
    return Case(parts, pause=dice.random() / 30, leaves=True)


def several_at_once(dice: random.Random) -> Case:
    return Case([post(GOOD[:500]).replace(b"close", b"x") + post(GOOD) * dice.randrange(1, 4)])


KINDS: dict[str, Callable[[random.Random], Case]] = {
    each.__name__: each
    for each in (cut_body, damaged_picture, large_picture, huge_header, broken_http, wrong_length,
                 broken_chunks, wrong_type, wrong_path, wrong_host, wrong_origin, slow_sender,
                 several_at_once)
}  # fmt: skip


def send(port: int, case: Case) -> list[int]:
    """Send a case; return the statuses of all answers until the server closes or is silent."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as line:
        try:
            for part in case.parts:
                line.sendall(part)
                time.sleep(case.pause)
            if case.leaves:
                line.settimeout(0.05)
            while part := line.recv(65_536):
                answer += part
        except (TimeoutError, ConnectionError):
            assert case.leaves, "no answer, or the connection was cut"
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@dataclass(frozen=True)
class Server:
    """A server of its own process, and the file of its log."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def size(self) -> tuple[float, int, int]:
        """Return memory in MiB, open files and threads."""
        folder = Path(f"/proc/{self.process.pid}")
        memory = re.search(r"VmRSS:\s+(\d+)", (folder / "status").read_text())
        assert memory is not None
        files, threads = (len(list((folder / name).iterdir())) for name in ("fd", "task"))
        return int(memory[1]) / 1024, files, threads


@pytest.fixture
def server(tmp_path: Path, tiny_model: ModelConfig) -> Iterator[Server]:
    path, log = write_model(tmp_path / "tiny.safetensors", tiny_model), tmp_path / "log"
    with log.open("w") as errors, serving(str(path), stderr=errors) as (process, line):
        port = re.search(r":(\d+)/", line)
        assert port is not None
        yield Server(process, int(port[1]), log)


def storm(server: Server, cases: int, seed: int) -> Counter[tuple[str, int]]:
    """Send hostile requests from several clients, and a good one after each; count the answers."""
    found: Counter[tuple[str, int]] = Counter()
    lock = threading.Lock()

    def attack(number: int) -> None:
        dice = random.Random(f"{seed} {number}")
        name = list(KINDS)[number % len(KINDS)]
        case = KINDS[name](dice)
        statuses = send(server.port, case)
        good = send(server.port, Case([post(GOOD)]))
        assert all(200 <= status < 500 for status in statuses), (name, statuses, case)
        assert good == [200], (name, good, case)
        with lock:
            found.update((name, status) for status in statuses or [0])

    with ThreadPoolExecutor(CLIENTS) as clients:
        for _ in clients.map(attack, range(cases)):
            pass
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "cases", [130, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_hostile_requests_are_refused_and_leave_nothing_behind(server: Server, cases: int) -> None:
    for method in METHODS:  # each has something to load or to allocate
        for path in ("explain", "curve") * 4:
            send(server.port, Case([post(GOOD, path=f"{path}?method={method}")]))
    storm(server, max(130, cases // 20), seed=0)
    time.sleep(1)
    before = server.size()
    found = storm(server, cases, seed=1)
    time.sleep(1)
    after = server.size()
    print(*sorted(found.items()), f"MiB, files, threads: {before} -> {after}", sep="\n")
    refused = {name for name, status in found if 400 <= status < 500}
    assert refused >= set(KINDS) - {"cut_body", "slow_sender"}
    assert after[0] < 1.1 * before[0]
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 2
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "Error" not in log
