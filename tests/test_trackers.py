"""What is sent to TensorBoard, wandb and MLflow; the latter two are mocked."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.config.files import from_json
from vitrail.config.settings import Config
from vitrail.data.images import ImageSet, normalize
from vitrail.data.pictures import read_picture
from vitrail.errors import CheckpointError, ConfigError, OutputError, TrainingError
from vitrail.explain.panels import GREEN, RED
from vitrail.explain.training_pictures import choose_images, draw_attention
from vitrail.model.vit import VisionTransformer
from vitrail.training.loop import Update
from vitrail.training.run import Run
from vitrail.training.trackers import Trackers

ROW = {"epoch": 2, "step": 9, "train_loss": 1.5, "validation_accuracy": 0.25}


class FakeWandb:
    """A mock of the module wandb."""

    Image = staticmethod(lambda picture_HWC: ("image", picture_HWC.shape))

    def __init__(self) -> None:
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.exit_codes: list[int] = []
        self.fails = ""

    def init(
        self, *, project: str, name: str, id: str, resume: str, dir: str, config: dict[str, Any]
    ) -> "FakeWandb":
        self.break_at("init", "api_key not configured (no-tty)")
        assert resume in ("allow", "never", "must", "auto")
        self.inits.append({"project": project, "name": name, "id": id, "config": config})
        return self

    def log(self, content: dict[str, Any], *, step: int) -> None:
        self.break_at("log", "the network is gone")
        self.logged.append((content, step))

    def finish(self, exit_code: int = 0) -> None:
        self.break_at("finish", "the network is gone")
        self.exit_codes.append(exit_code)

    def break_at(self, name: str, message: str) -> None:
        if self.fails == name:
            raise self.errors.Error(message)


class FakeMlflow:
    """A mock of the module mlflow, which is also its own client.

    Names, arguments and statuses are those of ``mlflow.MlflowClient``.
    """

    def __init__(self) -> None:
        self.exceptions = SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))
        self.experiments: list[str] = []
        self.runs: list[tuple[str, str]] = []
        self.parameters: dict[str, Any] = {}
        self.metrics: list[tuple[str, str, float, int]] = []
        self.images: list[tuple[tuple[int, ...], str]] = []
        self.statuses: list[str] = []
        self.fails = False

    def MlflowClient(self) -> "FakeMlflow":
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        found = SimpleNamespace(experiment_id=f"id of {name}")
        return found if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return f"id of {name}"

    def create_run(self, experiment_id: str, *, run_name: str) -> Any:
        self.runs.append((experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"r{len(self.runs)}"))

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        self.parameters[key] = value

    def log_metric(self, run_id: str, key: str, value: float, *, step: int) -> None:
        if self.fails:
            raise self.exceptions.MlflowException("the server is gone\nsecond line")
        self.metrics.append((run_id, key, value, step))

    def log_image(self, run_id: str, image: np.ndarray, artifact_file: str) -> None:
        self.images.append((image.shape, artifact_file))

    def update_run(self, run_id: str, *, status: str) -> None:
        self.set_status(status)

    def set_terminated(self, run_id: str, *, status: str = "FINISHED") -> None:
        self.set_status(status)

    def set_status(self, status: str) -> None:
        assert status in ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")
        self.statuses.append(status)


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
    problems: list[str] = []
    with Trackers(asking(wandb=True), tmp_path / "name", problems) as trackers:
        trackers.write(ROW, picture_file(tmp_path))
    (how,) = wandb.inits
    assert (how["project"], how["name"]) == ("vitrail", "name")
    assert how["config"]["learning_rate"] == 5e-4
    assert how["config"]["data_path"] == "data"
    numbers = {"train_loss": 1.5, "validation_accuracy": 0.25}
    assert wandb.logged == [({**numbers, "attention": ("image", (7, 11, 3))}, 9)]
    assert wandb.exit_codes == [0]
    assert problems == []


def test_a_resumed_run_is_continued_in_wandb_too(wandb: FakeWandb, tmp_path: Path) -> None:
    for name in ("a", "a", "b"):
        with Trackers(asking(wandb=True), tmp_path / name, []):
            pass
    first, second, other = (how["id"] for how in wandb.inits)
    assert first == second != other


def test_wandb_without_an_account_is_one_clear_error(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.fails = "init"
    with pytest.raises(OutputError, match=r"wandb: api_key not configured .*: run wandb login"):
        Trackers(asking(wandb=True), tmp_path, [])


def test_mlflow_gets_settings_numbers_and_pictures(mlflow: FakeMlflow, tmp_path: Path) -> None:
    for _ in range(2):
        with Trackers(asking(mlflow=True), tmp_path / "name", []) as trackers:
            trackers.write(ROW, picture_file(tmp_path))
    assert mlflow.runs == [("id of vitrail", "name")]
    assert mlflow.parameters["learning_rate"] == 5e-4
    numbers = [("r1", "train_loss", 1.5, 9), ("r1", "validation_accuracy", 0.25, 9)]
    assert mlflow.metrics == numbers * 2
    assert mlflow.images[0] == ((7, 11, 3), "attention/step-0000009.png")
    assert mlflow.statuses == ["RUNNING", "FINISHED"] * 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingError("nan"), "FAILED"),
        (MemoryError(), "FAILED"),
        (GeneratorExit(), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_an_interrupted_run_is_not_reported_as_finished(
    error: BaseException, status: str, wandb: FakeWandb, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    config = asking(wandb=True, mlflow=True)
    with pytest.raises(type(error)), Trackers(config, tmp_path, []):
        raise error
    assert wandb.exit_codes == [1]
    assert mlflow.statuses[-1] == status


def test_a_tracker_that_fails_is_dropped_and_the_others_continue(
    wandb: FakeWandb, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    problems: list[str] = []
    mlflow.fails = True
    with Trackers(asking(wandb=True, mlflow=True), tmp_path, problems) as trackers:
        trackers.write(ROW)
        trackers.write({**ROW, "step": 12})
    assert problems == ["mlflow: the server is gone; nothing was sent to it from step 9 on"]
    assert [step for _, step in wandb.logged] == [9, 12]
    assert mlflow.statuses[-1] == "FAILED"
    assert wandb.exit_codes == [0]


def test_a_tracker_that_fails_to_close_does_not_keep_others_from_closing(
    wandb: FakeWandb, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    problems: list[str] = []
    wandb.fails = "finish"
    with Trackers(asking(wandb=True, mlflow=True), tmp_path, problems):
        pass
    assert problems == ["wandb: the network is gone"]
    assert mlflow.statuses[-1] == "FINISHED"


def test_a_tracker_that_fails_to_start_closes_the_others(
    wandb: FakeWandb, mlflow: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = mlflow.exceptions.MlflowException("no server")

    def create_run(experiment_id: str, *, run_name: str) -> None:
        raise error

    monkeypatch.setattr(mlflow, "create_run", create_run)
    with pytest.raises(OutputError, match="mlflow: no server: set MLFLOW_TRACKING_URI"):
        Trackers(asking(wandb=True, mlflow=True), tmp_path, [])
    assert wandb.exit_codes == [1]


@pytest.mark.parametrize("content", ["", "3", "\x00"])
def test_a_corrupt_file_of_ids_is_one_line(content: str, wandb: FakeWandb, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trackers\.json: corrupt: remove it"):
        Trackers(asking(wandb=True), tmp_path, [])


def test_a_run_whose_tracker_fails_has_its_result(
    mlflow: FakeMlflow, tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.training.run.plot_run", lambda *_: [])
    mlflow.fails = True
    run = Run.start(from_json({"run": {"mlflow": True}}, tiny_run), tmp_path / "a")
    for _ in run.train():
        pass
    run.finish()
    assert (tmp_path / "a/result.json").exists()
    assert run.problems == ["mlflow: the server is gone; nothing was sent to it from step 3 on"]


def test_a_loop_that_ends_with_an_epoch_reports_that_epoch(
    mlflow: FakeMlflow, tiny_run: Config, tmp_path: Path
) -> None:
    settings = {"run": {"mlflow": True, "attention_epochs": 1}}
    run = Run.start(from_json(settings, tiny_run), tmp_path / "a")
    for event in run.train():
        if isinstance(event, Update) and event.ends_epoch:
            break  # before its EpochEnd
    assert len(run.rows) == 1
    assert [step for _, name, _, step in mlflow.metrics if name == "train_loss"] == [3]
    assert (tmp_path / "a/attention/epoch-0001.png").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_reported_before_the_run_begins(
    name: str, tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"^{name} is not installed: pip install "):
        Run(from_json({"run": {name: True}}, tiny_run), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_attention_is_drawn_every_n_epochs(tiny_run: Config, tmp_path: Path) -> None:
    run = Run.start(from_json({"run": {"attention_epochs": 2}}, tiny_run), tmp_path)
    for _ in run.train():
        pass
    (drawn,) = (tmp_path / "attention").iterdir()
    assert drawn.name == "epoch-0002.png"
    assert read_picture(drawn).std() > 10


def test_tensorboard_gets_the_attention_plot(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with Trackers(asking(tensorboard=True), tmp_path, []) as trackers:
        trackers.write(ROW, picture_file(tmp_path))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("attention")
    assert (image.step, image.width, image.height) == (9, 11, 7)
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(9, 1.5)]


def test_plotted_images_are_spread_over_the_split() -> None:
    raw_BCHW = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1)
    images = ImageSet(raw_BCHW, torch.arange(30), tuple(map(str, range(30))))
    assert choose_images(images, 1).labels_B.tolist() == [0, 4, 8, 12, 16, 20, 24, 29]
    assert choose_images(images.take(torch.arange(5)), 1).labels_B.tolist() == [0, 1, 2, 3, 4]
    assert len(choose_images(images.take(torch.arange(0)), 0)) == 0
    with pytest.raises(ConfigError, match="attention_epochs draws validation images"):
        choose_images(images.take(torch.arange(0)), 1)


def test_the_picture_has_a_column_per_image(tiny_model: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(Config(), model=dataclasses.replace(tiny_model, n_channels=1))
    raw_BCHW = torch.randint(0, 256, (3, 1, 20, 28), dtype=torch.uint8)
    images = ImageSet(raw_BCHW, torch.tensor([0, 6, 2]), tuple("abcde$g"))
    model = VisionTransformer(config.model).train()
    before = torch.get_rng_state()
    draw_attention(model, images, config, tmp_path / "x/a.png")
    picture_HWC = read_picture(tmp_path / "x/a.png")
    assert min(picture_HWC.shape[:2]) > 250
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert np.ptp(picture_HWC) > 0


def test_titles_distinguish_right_from_wrong_predictions(tiny_model: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(Config(), model=tiny_model)
    model = VisionTransformer(config.model).eval()
    raw_BCHW = torch.zeros(1, 3, 20, 28, dtype=torch.uint8)
    with torch.inference_mode():
        guess = int(model(normalize(raw_BCHW, config.data.mean, config.data.std)).argmax())
    green, red = GREEN["light"], RED["light"]
    for label, ink, other in ((guess, green, red), ((guess + 1) % 7, red, green)):
        images = ImageSet(raw_BCHW, torch.tensor([label]), tuple("abcdefg"))
        draw_attention(model, images, config, tmp_path / "a.png")
        title_HWC = read_picture(tmp_path / "a.png").astype(int)

        def count(color: str, title_HWC: Any = title_HWC) -> int:
            rgb = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
            return int((np.abs(title_HWC - rgb).max(axis=2) < 24).sum())

        assert count(ink) > 0
        assert count(other) == 0


def test_ids_of_several_trackers_are_kept(
    wandb: FakeWandb, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    with Trackers(asking(wandb=True, mlflow=True), tmp_path, []):
        pass
    kept = json.loads((tmp_path / "trackers.json").read_text())
    assert kept == {"wandb": wandb.inits[0]["id"], "mlflow": "r1"}
