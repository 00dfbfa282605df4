"""What goes to TensorBoard, wandb and MLflow; stand-ins take the place of the latter two."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vitrine.config import Config
from vitrine.configfile import from_json
from vitrine.data.images import ImageSet
from vitrine.data.pictures import read_picture
from vitrine.errors import ConfigError, OutputError
from vitrine.explain.watch import WATCHED, choose_watched, draw_attention
from vitrine.model import VisionTransformer
from vitrine.run import Run
from vitrine.trackers import Trackers

ROW = {"epoch": 2, "step": 9, "train_loss": 1.5, "validation_accuracy": 0.25}


class FakeWandb:
    """What ``import wandb`` gives, as far as it is used."""

    Image = staticmethod(lambda picture_HWC: ("image", picture_HWC.shape))

    def __init__(self) -> None:
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0
        self.fails = False

    def init(self, **how: Any) -> "FakeWandb":
        if self.fails:
            raise self.errors.Error("api_key not configured (no-tty)")
        self.inits.append(how)
        return self

    def log(self, content: dict[str, Any], step: int) -> None:
        self.logged.append((content, step))

    def finish(self) -> None:
        self.finished += 1


class FakeMlflow:
    """What ``import mlflow`` gives, as far as it is used; it is its own client."""

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))
        self.calls: list[tuple[Any, ...]] = []
        self.fails = False

    def MlflowClient(self) -> "FakeMlflow":
        return self

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return f"id of {name}"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("create_run", experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r17"))

    def log_metric(self, run_id: str, name: str, value: float, step: int) -> None:
        if self.fails:
            raise self.exceptions.MlflowException("the server is gone\nsecond line")
        self.calls.append((run_id, name, value, step))

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **more: self.calls.append((name, *words, *more.values()))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return fake


def asking(**run: Any) -> Config:
    return from_json({"run": run})


def picture_file(folder: Path) -> Path:
    from PIL import Image

    path = folder / "a.png"
    Image.new("RGB", (11, 7), (1, 2, 3)).save(path)
    return path


def test_wandb_gets_settings_numbers_and_pictures(wandb: FakeWandb, tmp_path: Path) -> None:
    with Trackers(asking(wandb=True), tmp_path / "name") as trackers:
        trackers.write(ROW, picture_file(tmp_path))
    (how,) = wandb.inits
    assert (how["project"], how["name"], how["resume"]) == ("vitrine", "name", "allow")
    assert how["config"]["learning_rate"] == 5e-4
    assert how["config"]["data_path"] == "data"
    numbers = {"train_loss": 1.5, "validation_accuracy": 0.25}
    assert wandb.logged == [({**numbers, "attention": ("image", (7, 11, 3))}, 9)]
    assert wandb.finished == 1


def test_a_run_that_goes_on_goes_on_in_wandb_too(wandb: FakeWandb, tmp_path: Path) -> None:
    for name in ("a", "a", "b"):
        with Trackers(asking(wandb=True), tmp_path / name):
            pass
    first, second, other = (how["id"] for how in wandb.inits)
    assert first == second != other


def test_wandb_without_an_account_is_one_clear_error(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.fails = True
    with pytest.raises(OutputError, match=r"wandb: api_key not configured .*: run wandb login"):
        Trackers(asking(wandb=True), tmp_path)


def test_mlflow_gets_settings_numbers_and_pictures(mlflow: FakeMlflow, tmp_path: Path) -> None:
    for _ in range(2):
        with Trackers(asking(mlflow=True), tmp_path / "name") as trackers:
            trackers.write(ROW, picture_file(tmp_path))
    assert mlflow.calls.count(("create_run", "id of vitrine", "name")) == 1
    assert ("log_param", "r17", "learning_rate", 5e-4) in mlflow.calls
    assert mlflow.calls.count(("r17", "train_loss", 1.5, 9)) == 2
    assert not any("epoch" in call[:2] for call in mlflow.calls)
    (picture, name) = next(call[2:] for call in mlflow.calls if call[0] == "log_image")
    assert (picture.shape, name) == ((7, 11, 3), "attention/step-0000009.png")
    assert mlflow.calls[-1] == ("set_terminated", "r17")


def test_mlflow_that_fails_is_one_line(mlflow: FakeMlflow, tmp_path: Path) -> None:
    trackers = Trackers(asking(mlflow=True), tmp_path)
    mlflow.fails = True
    with pytest.raises(OutputError, match=r"^mlflow: the server is gone$"):
        trackers.write(ROW)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_told_before_the_run_begins(
    name: str, tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"^{name} is not installed: pip install {name}$"):
        Run(from_json({"run": {name: True}}, tiny_run), tmp_path)


def test_attention_is_drawn_every_so_many_epochs(tiny_run: Config, tmp_path: Path) -> None:
    run = Run.start(from_json({"run": {"attention_epochs": 2}}, tiny_run), tmp_path)
    for _ in run.train():
        pass
    (drawn,) = (tmp_path / "attention").iterdir()
    assert drawn.name == "epoch-0002.png"
    assert read_picture(drawn).std() > 10


def test_tensorboard_gets_the_picture(tmp_path: Path) -> None:
    trackers = Trackers(asking(), tmp_path)
    calls: list[Any] = []
    trackers.events.writer = SimpleNamespace(
        add_scalar=lambda *words: calls.append(words),
        flush=lambda: None,
        add_image=lambda name, picture, step, dataformats: calls.append(
            (name, picture.shape, step, dataformats)
        ),
    )
    trackers.write(ROW, picture_file(tmp_path))
    assert calls[-1] == ("attention", (7, 11, 3), 9, "HWC")
    assert ("train_loss", 1.5, 9) in calls


def test_watched_images_are_spread_over_the_split() -> None:
    raw_BCHW = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1)
    images = ImageSet(raw_BCHW, torch.arange(30), tuple(map(str, range(30))))
    assert choose_watched(images, 1).labels_B.tolist() == [0, 4, 8, 12, 16, 20, 24, 29]
    assert choose_watched(images.take(torch.arange(5)), 1).labels_B.tolist() == [0, 1, 2, 3, 4]
    assert len(choose_watched(images.take(torch.arange(0)), 0)) == 0
    with pytest.raises(ConfigError, match="attention_epochs draws validation images"):
        choose_watched(images.take(torch.arange(0)), 1)


def test_the_picture_has_a_column_an_image(tiny_model: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(Config(), model=dataclasses.replace(tiny_model, n_channels=1))
    raw_BCHW = torch.randint(0, 256, (3, 1, 20, 28), dtype=torch.uint8)
    images = ImageSet(raw_BCHW, torch.tensor([0, 6, 2]), tuple("abcde$g"))
    model = VisionTransformer(config.model).train()
    before = torch.get_rng_state()
    picture_HWC = read_picture(draw_attention(model, images, config, tmp_path / "x/a.png"))
    assert picture_HWC.shape[:2] == (304, round(3 * 1.6 * 80))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert WATCHED == 8
    assert np.ptp(picture_HWC) > 0


def test_ids_are_kept_side_by_side(wandb: FakeWandb, mlflow: FakeMlflow, tmp_path: Path) -> None:
    with Trackers(asking(wandb=True, mlflow=True), tmp_path):
        pass
    kept = json.loads((tmp_path / "trackers.json").read_text())
    assert kept == {"wandb": wandb.inits[0]["id"], "mlflow": "r17"}
