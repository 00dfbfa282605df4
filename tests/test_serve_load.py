"""A server under load: it stops without losing a request, and outlives damage to a model's file."""

import http.client
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import vitrail
from test_serve import picture, serving, write_model
from vitrail.config.settings import ModelConfig

pytest.importorskip("uvicorn", reason="uvicorn is not installed")

CLIENTS = 16
PICTURE = picture(40, 30)
COUNTING = """
import sys
from vitrail.serve import app
build, begun, answered = app.build_app, [], []

def counting(*given):
    inner = build(*given)

    async def outer(scope, receive, send):
        async def count(message):
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered.append(scope["path"])

        if scope["type"] == "http":
            begun.append(scope["path"])
        await inner(scope, receive, count)
        if scope["type"] == "lifespan":
            print(len(begun), len(answered), flush=True)

    return outer

app.build_app = counting
from vitrail.cli.serve import command
command(sys.argv[1:])
"""
"""Run the command; print at the end how many requests the application got and answered."""


@contextmanager
def loaded(model: Path, **options: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Serve a model; yield the process and its port."""
    with serving(str(model), stderr=subprocess.PIPE, **options) as (process, line):
        port = re.search(r":(\d+)/", line)
        assert port is not None
        yield process, int(port[1])


class Load:
    """Clients that send the same picture until they are stopped or the server closes."""

    def __init__(self, port: int, path: str) -> None:
        self.answers: list[tuple[int, str]] = []
        self.going = True
        self._threads = [
            threading.Thread(target=self._repeat, args=(port, path)) for _ in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _repeat(self, port: int, path: str) -> None:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with closing(line):
            while self.going:
                try:
                    line.request("POST", path, PICTURE)
                    answer = line.getresponse()
                except ConnectionError:
                    return  # before an answer began
                self.answers.append((answer.status, answer.read().decode()))
                if answer.getheader("connection") == "close":
                    return

    def wait_for(self, more: int) -> None:
        """Wait for this many more answers."""
        enough = len(self.answers) + more
        while len(self.answers) < enough:
            time.sleep(0.01)

    def join(self) -> None:
        """Wait until every client has stopped."""
        self.going = False
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("path", ["/api/predict", "/api/explain?method=occlusion"])
def test_a_server_that_is_stopped_under_load_loses_no_request(
    tmp_path: Path, tiny_model: ModelConfig, path: str
) -> None:
    model = write_model(tmp_path / "tiny.safetensors", tiny_model)
    with loaded(model, python=("-c", COUNTING)) as (process, port):
        load = Load(port, path)
        load.wait_for(5 * CLIENTS)
        process.terminate()
        printed, log = process.communicate(timeout=60)
        load.join()
    begun, answered = map(int, printed.split())
    assert begun == answered == len(load.answers)
    assert {status for status, _ in load.answers} == {200}
    assert process.returncode in (0, -signal.SIGTERM)
    assert log == ""


def test_a_file_that_is_damaged_under_load_is_told_once_and_the_old_model_goes_on(
    tmp_path: Path, tiny_model: ModelConfig
) -> None:
    path = write_model(tmp_path / "tiny.safetensors", tiny_model)
    other = write_model(tmp_path / "other.safetensors", tiny_model, seed=1)
    old, new = (vitrail.load(each).predict(PICTURE)[0][0] for each in (path, other))
    assert abs(old.probability - new.probability) > 1e-4
    content = path.read_bytes()
    with loaded(path) as (process, port):
        load = Load(port, "/api/predict?top=1")
        load.wait_for(2 * CLIENTS)
        for damaged in (content[:1000], b"\x00" * len(content)):
            (tmp_path / "damaged").write_bytes(damaged)
            (tmp_path / "damaged").replace(path)
            load.wait_for(4 * CLIENTS)
        kept = load.answers[:]
        other.replace(path)
        load.wait_for(4 * CLIENTS)
        load.join()
        process.terminate()
        log = process.communicate(timeout=60)[1]
    assert {status for status, _ in load.answers} == {200}
    found = [json.loads(text)["predictions"][0]["probability"] for _, text in kept]
    assert found == pytest.approx([old.probability] * len(kept), abs=1e-6)
    last = json.loads(load.answers[-1][1])["predictions"][0]
    assert last["probability"] == pytest.approx(new.probability, abs=1e-6)
    lines = log.splitlines()
    assert len(lines) == 2
    assert all("tiny" in line and "safetensors" in line for line in lines)


IMPATIENT = """
import sys, time
from vitrail.cli.serve import command
from vitrail.serve import connections, responses
connections.SECONDS_TO_ASK = 0.5
explanation = responses.explanation
def slow(*args):
    time.sleep(1)
    return explanation(*args)
responses.explanation = slow
command(sys.argv[1:])
"""
"""The time allowed for a header is shorter than a map takes."""


def test_a_connection_without_a_request_is_closed_in_time(
    tmp_path: Path, tiny_model: ModelConfig
) -> None:
    model = write_model(tmp_path / "tiny.safetensors", tiny_model)
    with loaded(model, python=("-c", IMPATIENT)) as (_, port):
        for begun in (b"", b"POST /api/predict HTTP/1.1\r\nHost: 127"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as idle:
                idle.sendall(begun)
                assert idle.recv(1) == b""
        # A request that takes longer is answered; then the connection may be slow once more.
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:
            client.request("POST", "/api/explain?method=balanced", PICTURE)
            answer = client.getresponse()
            assert answer.status == 200
            answer.read()
            assert client.sock is not None
            client.sock.sendall(b"GET / HTTP/1.1\r\n")
            assert client.sock.recv(1) == b""
