"""The server: its answers equal the library's, and hostile requests are refused with 4xx."""

import asyncio
import io
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.cli.serve import _listen
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.errors import ConfigError
from vitrail.explain.stored_scores import Badge, Verdict
from vitrail.model.vit import VisionTransformer
from vitrail.serve import responses, security
from vitrail.serve.app import build_app
from vitrail.serve.batching import Batcher, BusyError, Lane
from vitrail.serve.models import MissingError, Shelf
from vitrail.serve.parameters import Question
from vitrail.weights.checkpoint import CheckpointInfo, save_weights_file

requests = pytest.importorskip("starlette.requests")
testclient = pytest.importorskip("starlette.testclient")

CLASSES = tuple("abcdefg")
Client = Any


def write_model(path: Path, config: ModelConfig, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    info = CheckpointInfo(Config(model=config, data=DataConfig(dataset="folder")), CLASSES, {}, {})
    save_weights_file(path, info, dict(VisionTransformer(config).state_dict()))
    return path


def picture(width: int = 60, height: int = 40, kind: str = "PNG", seed: int = 0) -> bytes:
    file, random = io.BytesIO(), np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def model(tmp_path: Path, tiny_model: ModelConfig) -> Path:
    return write_model(tmp_path / "tiny.safetensors", tiny_model)


def open_client(*models: Path | str, host: str = "127.0.0.1") -> Client:
    shelf = Shelf([str(model) for model in models], Path("nowhere"))
    app = build_app(shelf, host)
    return testclient.TestClient(
        app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False
    )


@pytest.fixture
def client(model: Path) -> Iterator[Client]:
    with open_client(model) as opened:
        yield opened


def test_the_model_is_described(client: Client) -> None:
    assert client.get("/api/models").json() == {"models": ["tiny"], "runs": []}
    described = client.get("/api/models/tiny").json()
    assert described["classes"] == list(CLASSES)
    assert (described["rows"], described["columns"]) == (5, 7)
    assert (described["steps"], described["scores"]) == ([], None)


def test_predictions_are_those_of_the_library(client: Client, model: Path) -> None:
    answer = client.post("/api/predict?top=3", content=picture()).json()
    expected = vitrail.load(model).predict(picture(), top_k=3)[0]
    assert [each["class"] for each in answer["predictions"]] == [each.name for each in expected]
    found = [each["probability"] for each in answer["predictions"]]
    assert found == pytest.approx([each.probability for each in expected], abs=1e-6)


@pytest.mark.parametrize("method", ["attention", "rollout", "balanced", "occlusion", "relevance"])
def test_maps_are_those_of_the_library(client: Client, model: Path, method: str) -> None:
    answer = client.post(f"/api/explain?method={method}&class=c", content=picture()).json()
    expected = vitrail.load(model).explain(picture(), method=method, class_name="c")
    assert np.array(answer["maps"]) == pytest.approx(expected.maps_FGJ, rel=1e-3, abs=1e-6)
    assert answer["class"] == "c"
    assert answer["signed"] is (method in ("balanced", "occlusion"))
    assert len(answer["predictions"]) == 5


def test_the_method_by_default_is_the_one_of_the_library(client: Client) -> None:
    for query, method in (("top=1", "balanced"), ("points=2", "balanced"), ("layers=1", "rollout")):
        answer = client.post(f"/api/explain?{query}", content=picture()).json()
        assert answer["method"] == method


def test_shapley_values_sum_to_the_gain_and_have_errors(client: Client) -> None:
    url = "/api/explain?method=shapley&class=b&passes=300"
    answer = client.post(url, content=picture()).json()
    everything = ",".join(map(str, range(35)))
    whole, blank = (
        {each["class"]: each["probability"] for each in reply.json()["predictions"]}["b"]
        for reply in (
            client.post("/api/predict?top=7", content=picture()),
            client.post(f"/api/predict?top=7&hide={everything}", content=picture()),
        )
    )
    assert np.sum(answer["maps"]) == pytest.approx(whole - blank, abs=2e-3)
    assert np.shape(answer["errors"]) == (5, 7)
    assert np.min(answer["errors"]) > 0


def test_what_the_model_sees_can_be_sent_back(client: Client) -> None:
    first = client.post("/api/predict?seen=1", content=picture(400, 100)).json()
    left, top, right, bottom = first["seen"]["box"]
    assert (left, top, right, bottom) == pytest.approx((0.325, 0, 0.675, 1))
    import base64

    seen = base64.b64decode(first["seen"]["picture"].partition(",")[2])
    assert Image.open(io.BytesIO(seen)).size == (28, 20)
    again = client.post("/api/predict?prepared=1", content=seen).json()
    assert again["predictions"] == first["predictions"]


def test_hidden_patches_have_the_mean_color(client: Client, model: Path) -> None:
    answer = client.post("/api/predict?hide=0,34&top=7", content=picture()).json()
    classifier = vitrail.load(model)
    raw_1HWC = classifier.read(picture())
    mean_3 = raw_1HWC[0].mean((0, 1)).round()
    raw_1HWC[0, :4, :4] = raw_1HWC[0, 16:, 24:] = mean_3
    expected = classifier.predict_raw(raw_1HWC, top_k=7)[0]
    found = {each["class"]: each["probability"] for each in answer["predictions"]}
    assert found == pytest.approx({each.name: each.probability for each in expected}, abs=1e-6)


def test_the_curve_begins_at_the_prediction_and_hides_the_highest_first(client: Client) -> None:
    answer = client.post("/api/curve?method=balanced&class=a", content=picture()).json()
    plain = client.post("/api/predict?top=7", content=picture()).json()["predictions"]
    start = {each["class"]: each["probability"] for each in plain}["a"]
    assert sorted(answer["order"]) == list(range(35))
    assert (answer["counts"][0], answer["counts"][-1]) == (0, 35)
    for curve in answer["curves"].values():
        assert curve[0] == pytest.approx(start, abs=1e-4)
    url = "/api/explain?method=balanced&class=a&resolution=patch"
    map_N = np.ravel(client.post(url, content=picture()).json()["maps"])
    assert answer["order"][0] == map_N.argmax()


def test_the_page_is_one_file_for_download(client: Client) -> None:
    answer = client.post("/api/page?class=d", content=picture())
    assert answer.text.startswith("<!doctype html>")
    assert "attachment" in answer.headers["content-disposition"]


def test_the_downloaded_page_has_the_badges_of_the_methods(model: Path) -> None:
    badge = Badge("relevance", 0.4, 0.3, 0.5, True, True, True)
    verdict = Verdict("validation", 300, (badge,), "Trust relevance.")
    classifier = replace(vitrail.load(model), verdict=verdict)
    seen = responses.look(classifier, picture(), Question())
    html = responses.page(seen, Question()).decode()
    assert re.search(r'"badges": ?\{"relevance":', html)


# Requests that are refused.


def bomb() -> bytes:
    """50 kB that would decode to 1.2 GB."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


HOSTILE: dict[str, tuple[str, bytes, int]] = {
    "nothing": ("predict", b"", 400),
    "no picture": ("predict", b"\x00" * 100, 400),
    "a bomb": ("predict", bomb(), 400),
    "cut": ("predict", picture()[:900], 400),
    "a program": ("predict", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400),
    "no model": ("predict?model=other", picture(), 404),
    "a path as model": ("predict?model=../../etc/passwd", picture(), 404),
    "no checkpoint": ("predict?step=3", picture(), 404),
    "unknown parameter": ("predict?tpo=3", picture(), 400),
    "twice": ("predict?top=3&top=4", picture(), 400),
    "not a number": ("predict?top=x", picture(), 400),
    "a huge number": ("predict?top=" + "9" * 5000, picture(), 400),
    "zero": ("predict?top=0", picture(), 400),
    "no such patch": ("predict?hide=35", picture(), 400),
    "no method": ("explain?method=oclusion", picture(), 400),
    "not a map of importance": ("curve?method=norms", picture(), 400),
    "no class": ("explain?method=balanced&class=cat", picture(), 400),
    "no layer": ("explain?method=attention&layers=9", picture(), 400),
    "no effect": ("explain?method=gradcam&layers=1", picture(), 400),
    "no query": ("explain?method=attention&query=3", picture(), 400),
    "not finite": ("explain?method=rollout&discard_ratio=nan", picture(), 400),
    "too many passes": ("explain?method=shapley&passes=999999", picture(), 400),
    "too large a window": ("explain?method=occlusion&window=8", picture(), 400),
    "a view cannot be removed": ("curve?method=features", picture(), 400),
    "not found": ("nothing", picture(), 404),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_are_refused_in_a_line(client: Client, name: str, model: Path) -> None:
    path, body, status = HOSTILE[name]
    answer = client.post(f"/api/{path}", content=body)
    assert answer.status_code == status
    message = answer.json()["error"]
    assert "\n" not in message
    assert str(model.parent) not in message
    assert client.post("/api/predict", content=picture()).status_code == 200


def test_pictures_with_too_many_pixels_are_refused_before_they_are_decoded(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "MOST_PIXELS", 1000)
    monkeypatch.setattr(responses, "MOST_JPEG_PIXELS", 3000)
    for kind, side, status in (("PNG", 40, 400), ("JPEG", 40, 200), ("JPEG", 60, 400)):
        answer = client.post("/api/predict", content=picture(side, side, kind))
        assert answer.status_code == status, answer.text


def test_large_bodies_are_refused_declared_or_not(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "MOST_BYTES", 2000)
    assert client.post("/api/predict", content=picture()).status_code == 413
    assert client.post("/api/predict", content=iter([picture()] * 3)).status_code == 413


def test_slow_senders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "SECONDS_TO_SEND", 0.01)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.1)
        return {"type": "http.request", "body": b"x", "more_body": True}

    request = requests.Request({"type": "http", "headers": []}, receive)
    with pytest.raises(security.RefusedError, match="too slowly") as caught:
        asyncio.run(security.Bodies().read(request))
    assert caught.value.status == 408


def test_bodies_that_need_too_much_memory_together_are_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "MOST_BYTES_TOGETHER", 100)
    answer = client.post("/api/predict", content=picture())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "10.0.0.5:8000"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),
    ],
)
def test_other_hosts_and_origins_are_refused(
    client: Client, headers: dict[str, str], status: int
) -> None:
    assert client.post("/api/predict", content=picture(), headers=headers).status_code == status


def test_on_every_address_numbers_are_hosts_but_not_names(model: Path) -> None:
    with open_client(model, host="0.0.0.0") as client:
        for host, status in (("10.0.0.5:8000", 200), ("evil.example", 403)):
            assert client.get("/api/models", headers={"host": host}).status_code == status


def test_every_answer_carries_the_policy(client: Client) -> None:
    for answer in (client.get("/api/models"), client.get("/no"), client.get("/", headers={
        "host": "evil.example"})):  # fmt: skip
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers


# Models that change.


def test_two_models_of_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(model, tmp_path / "other" / model.name)
    with pytest.raises(ConfigError, match="would both be served as tiny"):
        Shelf([str(model), str(tmp_path / "other" / model.name)], Path())


def test_a_replaced_file_is_loaded_and_a_damaged_one_is_not(
    client: Client, model: Path, tiny_model: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    first = client.post("/api/predict", content=picture()).json()
    write_model(model, tiny_model, seed=1)
    second = client.post("/api/predict", content=picture()).json()
    assert second != first
    model.write_bytes(model.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING, "vitrail"):
        for _ in range(2):
            assert client.post("/api/predict", content=picture()).json() == second
    assert len(caplog.records) == 1
    assert "not a model file" in caplog.text or "safetensors" in caplog.text


def test_a_model_that_never_loaded_is_missing_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 50)
    with open_client(tmp_path / "broken.safetensors") as client:
        answer = client.post("/api/predict", content=picture())
    assert answer.status_code == 404
    assert str(tmp_path) not in answer.text


def test_few_models_stay_in_memory(
    tmp_path: Path, tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.serve.models.MOST_LOADED", 2)
    paths = [write_model(tmp_path / f"m{n}.safetensors", tiny_model, n) for n in range(3)]
    shelf = Shelf([str(path) for path in paths], Path())
    first = shelf.get("m0")
    assert first.outputs is not None  # traced
    assert shelf.get("m0") is first
    shelf.get("m1"), shelf.get("m2")
    assert shelf.get("m0") is not first


def test_without_runs_the_bundled_models_are_served(tmp_path: Path) -> None:
    shelf = Shelf([], tmp_path)
    assert shelf.names() == ["cifar10", "cifar10-vit", "reference"]
    with pytest.raises(MissingError, match="did you mean 'cifar10'"):
        shelf.get("cifar1")


def test_a_run_with_the_name_of_a_bundled_model_is_served_beside_it(tmp_path: Path) -> None:
    pointer = tmp_path / "reference" / "checkpoints" / "BEST"
    pointer.parent.mkdir(parents=True)
    pointer.touch()
    shelf = Shelf([], tmp_path)
    assert shelf.names() == ["reference (yours)", "cifar10", "cifar10-vit", "reference"]
    assert shelf.source("reference (yours)") == str(tmp_path / "reference")
    assert shelf.source("reference") == "reference"
    assert Shelf(["cifar10", str(tmp_path / "reference")], tmp_path).default() == "cifar10"


def test_a_new_run_is_the_default_model_after_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [5.0]
    monkeypatch.setattr("vitrail.serve.models.time.monotonic", lambda: clock[0])
    shelf = Shelf([], tmp_path)
    assert shelf.default() == "cifar10"
    pointer = tmp_path / "mine" / "checkpoints" / "BEST"
    pointer.parent.mkdir(parents=True)
    pointer.touch()
    assert shelf.default() == "cifar10"
    clock[0] += 1.1
    assert shelf.default() == "mine"


# Queues and batches.


def test_a_lane_refuses_more_than_its_limit() -> None:
    async def use() -> tuple[int, ...]:
        lane, gate = Lane(limit=1), threading.Event()
        running = asyncio.create_task(lane.run(gate.wait))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await lane.run(int)
        gate.set()
        await running
        return (await lane.run(int, "7"),)

    assert asyncio.run(use()) == (7,)


class Recorder:
    """Stands for a classifier; each picture's answer is its first value."""

    model, device = None, torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def raw_outputs(self, raw_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.sizes.append(len(raw_BHWC))
        if raw_BHWC.max() > 200:
            raise ValueError("too bright")
        return raw_BHWC[:, :1, 0, 0], raw_BHWC[:, 0, 0, 0] / 255


def batch_of(values: list[int], **settings: Any) -> tuple[list[Any], list[int]]:
    async def use() -> list[Any]:
        batcher, recorder = Batcher(**settings), Recorder()
        batcher.reading = 1
        pictures = [np.full((2, 2, 1), value, np.uint8) for value in values]
        asked = [batcher.outputs(recorder, each) for each in pictures]  # type: ignore[arg-type]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return [found, recorder.sizes]

    found, sizes = asyncio.run(use())
    return found, sizes


def test_requests_at_once_share_batches_and_get_their_own_answers() -> None:
    found, sizes = batch_of(list(range(10)), largest=4)
    assert [int(logits_Y[0]) for logits_Y, _ in found] == list(range(10))
    assert [round(255 * familiarity) for _, familiarity in found] == list(range(10))
    assert sizes == [4, 4, 2]


def test_many_requests_are_shared_by_the_cores() -> None:
    assert sorted(batch_of(list(range(16)), largest=16, cores=2)[1]) == [8, 8]
    assert max(batch_of(list(range(40)), largest=8, cores=2)[1]) == 8
    assert batch_of([1], cores=4)[1] == [1]


def test_batches_have_few_sizes() -> None:
    assert batch_of(list(range(13)), largest=16, cores=1)[1] == [8, 4, 1]


def test_enough_pictures_do_not_wait_for_those_that_are_being_read() -> None:
    began = time.monotonic()
    assert batch_of([1, 2, 3, 4], enough=4, patience=5)[1] == [4]
    assert time.monotonic() - began < 4


def test_an_error_reaches_every_request_of_the_batch_and_no_other() -> None:
    found, _ = batch_of([1, 250, 3], largest=2)
    assert [isinstance(each, ValueError) for each in found] == [True, True, False]


def test_a_full_batcher_refuses() -> None:
    found, _ = batch_of([1, 2, 3], limit=2)
    assert [isinstance(each, BusyError) for each in found] == [False, False, True]


def test_an_unexpected_error_is_an_answer_without_details(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/home/secret")

    monkeypatch.setattr("vitrail.serve.responses.predictions", fail)
    answer = client.post("/api/predict", content=picture())
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_slow_work_is_not_begun_for_a_client_that_has_gone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, gate = list[str](), threading.Event()

    def work(_seen: object, question: Any) -> dict[str, str]:
        started.append(question.class_name)
        gate.wait(10)
        return {}

    monkeypatch.setattr("vitrail.serve.responses.removal_curves", work)
    app = build_app(Shelf([str(model)], Path()), "127.0.0.1")

    async def ask(name: str, leave: asyncio.Event) -> None:
        sent = [{"type": "http.request", "body": picture()}]

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(_message: object) -> None:
            pass

        scope = {
            "type": "http", "method": "POST", "path": "/api/curve", "root_path": "",
            "query_string": f"class={name}".encode(), "headers": [(b"host", b"127.0.0.1")],
        }  # fmt: skip
        await app(scope, receive, send)

    async def use() -> None:
        stays, leaves = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(ask("a", stays))
        while not started:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(ask("b", leaves))
        await asyncio.sleep(0.3)
        leaves.set()
        await asyncio.sleep(0.5)
        gate.set()
        await asyncio.gather(first, second)

    asyncio.run(use())
    assert started == ["a"]


# The command.


@contextmanager
def serving(
    *words: str, python: Sequence[str] = ("-m", "vitrail", "serve"), **options: Any
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the server in a process, and stop it at the end; yield the line that it prints, too."""
    command = [sys.executable, *python, "--no_browser", "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.terminate()


def test_it_serves_until_it_is_told_to_stop_and_loses_no_request(tmp_path: Path) -> None:
    with serving("cifar10", cwd=tmp_path) as (process, line):
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address is not None, line
        url = f"{address[0]}api/explain?method=shapley&passes=300"
        found: list[int] = []

        def ask() -> None:
            with urllib.request.urlopen(url, picture(), timeout=60) as answer:
                found.append(answer.status)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        process.terminate()
        asking.join()
        assert process.wait() in (0, -signal.SIGTERM)
    assert found == [200]


def test_the_command_refuses_what_it_cannot_serve(
    vitrail: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = vitrail("serve", "--no_browser", "nothing.safetensors", cwd=tmp_path)
    assert done.returncode == 2
    assert "no such model" in done.stderr  # in the log, which pytest takes from this process
    for words, problem in (
        (["--port", "70000", "cifar10"], "--port is 70000"),
        (["--host", "256.1.1.1", "cifar10"], "cannot listen on 256.1.1.1"),
    ):
        assert main(["serve", "--no_browser", *words]) == 2
        assert problem in capsys.readouterr().err


def test_answers_do_not_wait_for_acknowledgments() -> None:
    with (
        _listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
