"""What the server shows of a model's own data: examples, mistakes, the run."""

import dataclasses
import io
import json
import re
import shutil
import threading
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from test_serve import open_client, picture
from vitrail.config.files import from_json
from vitrail.config.settings import Config
from vitrail.data.images import normalize
from vitrail.explain.map_settings import METHODS, SUPPORTED_SETTINGS, TITLES
from vitrail.explain.stored_scores import Badge, Verdict
from vitrail.inference.classifier import Classifier
from vitrail.serve import model_data, responses
from vitrail.serve.model_data import BATCH, Data, Gallery
from vitrail.serve.models import Shelf
from vitrail.serve.parameters import SLOW
from vitrail.training.run import Run
from vitrail.training.run_folder import load_split
from vitrail.weights.checkpoint import CheckpointInfo, save_weights_file


@pytest.fixture
def run(tiny_run: Config, tmp_path: Path) -> Path:
    """A finished run on shapes, with all of its checkpoints."""
    folder = tmp_path / "short"
    folder.mkdir()
    keep = dataclasses.replace(tiny_run.run, keep_checkpoints=0)
    trained = Run.start(dataclasses.replace(tiny_run, run=keep), folder)
    for _ in trained.train():
        pass
    return folder


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def evaluated(client: Any, name: str) -> dict[str, Any]:
    for _ in range(600):
        found: dict[str, Any] = client.get(f"/api/models/{name}/confusion").json()
        if found["evaluated"] == found["images"]:
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def test_the_confusion_matrix_and_its_cells(run: Path) -> None:
    classifier = vitrail.load(run)
    images = load_split(classifier, "validation")
    inputs_BCHW = normalize(images.raw_BCHW, classifier.mean, classifier.std)
    probabilities_BY = classifier.probabilities(inputs_BCHW)
    best_B = probabilities_BY.argmax(1)
    with open_client(run) as client:
        found = evaluated(client, "short")
        assert found["images"] == len(images)
        assert found["classes"] == list(classifier.classes)
        expected_YY = torch.zeros(10, 10, dtype=torch.long)
        for label, best in zip(images.labels_B.tolist(), best_B.tolist(), strict=True):
            expected_YY[label, best] += 1
        assert found["counts"] == expected_YY.tolist()
        wrong_YY = expected_YY.clone().fill_diagonal_(0)
        label, best = divmod(int(wrong_YY.argmax()), 10)
        listed = client.get(f"/api/models/short/confusion/{label}/{best}").json()["pictures"]
        assert len(listed) == min(60, wrong_YY[label, best])
        sure = [each["probability"] for each in listed]
        assert sure == sorted(sure, reverse=True)
        for each in listed:
            assert (int(images.labels_B[each["index"]]), int(best_B[each["index"]])) == (
                label,
                best,
            )
        first = listed[0]["index"]
        png = client.get(f"/api/models/short/pictures/{first}").content
        assert np.array_equal(decode(png), images.raw_BCHW[first].permute(1, 2, 0).numpy())


def test_examples_are_there_without_the_data_and_mistakes_are_not(tmp_path: Path) -> None:
    with open_client("cifar10") as client:
        names = client.get("/api/models/cifar10/examples").json()["examples"]
        assert names == list(vitrail.load("cifar10").classes)
        right = 0
        for index, name in enumerate(names):
            png = client.get(f"/api/models/cifar10/examples/{index}").content
            assert decode(png).shape == (32, 32, 3)
            answer = client.post("/api/predict?top=1&prepared=1", content=png).json()
            right += answer["predictions"][0]["class"] == name
        assert right >= 7
        assert client.get("/api/models/cifar10/examples/10").status_code == 404


def test_missing_data_are_an_answer_without_a_path(run: Path, tmp_path: Path) -> None:
    classifier = vitrail.load(run)
    data = dataclasses.replace(
        classifier.config.data, dataset="folder", data_path=tmp_path / "secret"
    )
    config = dataclasses.replace(classifier.config, data=data)
    info = CheckpointInfo(config, classifier.classes, {}, {})
    save_weights_file(tmp_path / "away.safetensors", info, dict(classifier.model.state_dict()))
    with open_client(tmp_path / "away.safetensors") as client:
        for path in ("confusion", "confusion/1/2", "pictures/0", "run"):
            answer = client.get(f"/api/models/away/{path}")
            assert answer.status_code == 404 or answer.json() == {"pictures": []}
            assert "secret" not in answer.text
        assert client.get("/api/models/away/examples").json() == {"examples": []}


def test_data_that_take_long_to_load_do_not_delay_other_models(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, begun, gate = model_data._load, threading.Event(), threading.Event()

    def slow(name: str, classifier: Classifier) -> Data:
        begun.set()
        assert name != "short" or gate.wait(30)
        return load(name, classifier)

    monkeypatch.setattr(model_data, "_load", slow)
    gallery = Gallery(Shelf([str(run), "cifar10"], Path()))
    waiting = threading.Thread(target=gallery.confusion, args=("short",))
    waiting.start()
    assert begun.wait(30)
    assert len(gallery.examples("cifar10")) == 10
    assert waiting.is_alive()
    gate.set()
    waiting.join()
    assert gallery.confusion("short")["images"] == 1000


def test_a_model_that_is_replaced_by_another_shows_the_images_of_the_new_one(
    run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"

    def write(source: str | Path, **data: Any) -> None:
        model = vitrail.load(source)
        config = from_json({"data": data}, model.config)
        info = CheckpointInfo(config, model.classes, {}, {})
        save_weights_file(path, info, dict(model.model.state_dict()))

    write("cifar10")
    gallery = Gallery(Shelf([str(path)], Path()))
    assert "cat" in gallery.examples("m")
    write(run)
    assert "circle" in gallery.examples("m")
    assert not gallery.evaluate("m")
    before = gallery.confusion("m")
    assert (before["images"], before["evaluated"]) == (1000, BATCH)
    write(run, validation_images=100)
    after = gallery.confusion("m")
    assert (after["images"], after["evaluated"]) == (100, 0)


def test_more_models_than_are_kept_open_can_be_evaluated_in_turn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_data, "MOST_OPEN", 1)
    names = ["a", "b", "c"]
    for name in names:
        shutil.copytree(run, tmp_path / "runs" / name)
    gallery = Gallery(Shelf([str(tmp_path / "runs" / name) for name in names], Path()))
    for step in range(1, 4):
        for name in names:
            assert not gallery.evaluate(name)
            assert gallery.confusion(name)["evaluated"] == step * BATCH
    while not gallery.evaluate("a"):
        pass
    gallery.picture("b", 0)  # a is evaluated: it makes room, the others are kept
    assert gallery.confusion("b")["evaluated"] == 3 * BATCH
    assert gallery.confusion("a")["evaluated"] == 0


def test_a_run_shows_its_epochs_and_checkpoints(run: Path) -> None:
    with open_client(run) as client:
        assert client.get("/api/models").json()["runs"] == ["short"]
        shown = client.get("/api/models/short/run").json()
        assert [row["epoch"] for row in shown["rows"]] == [1, 2, 3]
        assert (shown["epochs"], shown["finished"]) == (3, False)
        steps = client.get("/api/models/short").json()["steps"]
        assert steps == [3, 6, 9]
        answers = [
            client.post(f"/api/predict?step={step}", content=picture()).json() for step in steps
        ]
        assert answers[0] != answers[2]
        rows = (
            (run / "metrics.jsonl")
            .read_text()
            .replace('"train_loss": ', '"train_loss": NaN, "x": ')
        )
        (run / "metrics.jsonl").write_text(rows)
        assert client.get("/api/models/short/run").json()["rows"][0]["train_loss"] is None
        (run / "metrics.jsonl").write_text("{")
        assert client.get("/api/models/short/run").status_code == 404


def test_a_run_that_goes_on_is_loaded_again(run: Path, tmp_path: Path) -> None:
    best = run / "checkpoints" / "BEST"
    best.write_text("step-0000003\n")
    with open_client(run) as client:
        first = client.post("/api/predict", content=picture()).json()
        best.write_text("step-0000009\n")
        assert client.post("/api/predict", content=picture()).json() != first
        last = client.post("/api/predict", content=picture()).json()
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").mkdir()
        assert client.post("/api/predict", content=picture()).json() == last


# The files of the page.


def test_the_page_has_only_its_own_files_and_no_inline_script() -> None:
    with open_client("cifar10") as client:
        page = client.get("/").text
        assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|https?://", page)
        names = re.findall(r'"/page/([\w.]+)"', page)
        scripts = {name for name in names if name.endswith(".js")}
        while scripts:
            answer = client.get(f"/page/{scripts.pop()}")
            assert answer.headers["content-type"].startswith("text/javascript")
            new = set(re.findall(r'from "\./([\w.]+)"', answer.text)) - set(names)
            names += new
            scripts |= new
        assert len(names) >= 10
        for path in ("../responses.py", "..%2Fresponses.py", "responses.py", "cifar10.png", "%00"):
            assert client.get(f"/page/{path}").status_code == 404


def test_numbers_in_addresses_are_checked(run: Path) -> None:
    with open_client(run) as client:
        for path in ("pictures/999999", "pictures/-1", "pictures/x", "confusion/1/x",
                     "pictures/" + "9" * 30):  # fmt: skip
            assert client.get(f"/api/models/short/{path}").status_code == 404
        assert json.loads(client.get("/api/models/short/confusion/99/99").text) == {"pictures": []}


def test_badges_are_those_of_the_stored_scores() -> None:
    badge = Badge("occlusion", 0.5, 0.4, 0.6, True, False, None)
    verdict = Verdict("validation", 40, (badge,), "Trust occlusion.")
    classifier = dataclasses.replace(vitrail.load("cifar10"), verdict=verdict)
    assert responses.describe("it", classifier)["scores"] == {
        "images": 40,
        "split": "validation",
        "trust": "Trust occlusion.",
        "methods": {"occlusion": {"srg": 0.5, "failures": ["does not depend on the model"]}},
    }


def test_the_page_knows_what_the_methods_of_the_library_can() -> None:
    script = (resources.files("vitrail.serve") / "page" / "view.js").read_text(encoding="utf-8")
    titles = dict(re.findall(r"^  (\w+): \[\"([^\"]+)\"", script, re.MULTILINE))
    assert titles == {method: TITLES[method] for method in METHODS}
    lists = {
        name: set(json.loads(text))
        for name, text in re.findall(r"const (\w+) = (\[\"[^]]+\])", script)
    }
    for name, setting in (("CONTRASTS", "against"), ("PIXELS", "resolution")):
        assert lists[name] == {each for each in METHODS if setting in SUPPORTED_SETTINGS[each]}
    assert lists["SLOW"] == set(SLOW)
