"""Models on the hub, with a mock of its client: pushing, loading, errors."""

import dataclasses
import fnmatch
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save

import vitrail
from layouts import make_state
from vitrail.cli import main
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.evaluation.calibration import Calibration
from vitrail.model.vit import VisionTransformer
from vitrail.runtime.files import write_json
from vitrail.weights.checkpoint import CheckpointInfo, save_checkpoint, write_pointer
from vitrail.weights.hub import download, without_paths

hub_library = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")


class Hub:
    """A mock of ``huggingface_hub.HfApi`` with the library's own signatures and exceptions."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.online = self.logged_in = True
        self.client = mock.create_autospec(hub_library.HfApi, instance=True)
        self.client.create_repo.side_effect = self.create_repo
        self.client.upload_folder.side_effect = self.upload_folder
        self.client.snapshot_download.side_effect = self.snapshot_download

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if not self.logged_in:
            response: Any = SimpleNamespace(status_code=401, headers={}, request=None)
            raise errors.HfHubHTTPError("401 Unauthorized\nfor url ...", response=response)
        self.repos.setdefault(repo_id, {})
        self.private[repo_id] = private
        return f"https://hub.test/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.repos[repo_id] |= {path.name: path.read_bytes() for path in folder_path.iterdir()}

    def snapshot_download(self, repo_id: str, *, revision: None, allow_patterns: list[str]) -> str:
        hub_library.utils.validate_repo_id(repo_id)
        folder = self.cache / repo_id
        if self.online:
            if repo_id not in self.repos:
                response: Any = SimpleNamespace(status_code=404, headers={}, request=None)
                raise errors.RepositoryNotFoundError("404 Not Found\n...", response=response)
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.repos[repo_id].items():
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (folder / name).write_bytes(content)
        elif not folder.exists():
            raise errors.LocalEntryNotFoundError("cannot find the requested files\n...")
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub's client is a mock."""
    server = Hub(tmp_path / "cache")
    monkeypatch.setattr(hub_library, "HfApi", lambda **_: server.client)
    return server


@pytest.fixture
def run(tmp_path: Path, tiny_model: ModelConfig) -> Path:
    """The files of a finished run that a push reads."""
    config = Config(model=tiny_model)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, dataset="cifar10", data_path=Path("/home/me/secret")),
        run=dataclasses.replace(config.run, output_path=tmp_path, seed=77),
        training=dataclasses.replace(config.training, init="/home/me/start.safetensors"),
    )
    torch.manual_seed(0)
    weights = VisionTransformer(tiny_model).state_dict()
    folder = tmp_path / "run" / "checkpoints" / "step-0000009"
    info = CheckpointInfo(
        config,
        ("ant", "bee", "cow", "dog", "eel", "fox", "gnu"),
        {"step": 9},
        {},
        Calibration(0.61),
    )
    save_checkpoint(folder, info, weights=weights, training={})
    write_pointer(folder.parent, "BEST", folder)
    test = {
        "accuracy": 0.7, "accuracy_interval": [0.66, 0.74], "loss": 0.91, "images": 500,
        "expected_calibration_error": 0.03, "calibration_error_before": 0.08, "temperature": 0.61,
        "smoothing": 0.1,
    }  # fmt: skip
    result = {"test": test, "epochs": 3, "train_images": 90, "seconds": 4.0, "parameters": 123}
    write_json(tmp_path / "run" / "result.json", result)
    return tmp_path / "run"


def test_local_paths_are_not_published_but_names_of_the_hub_are() -> None:
    for given, kept in ((Path("/home/me/secret"), Path("data")), (Path("hf:me/birds"),) * 2):
        config = Config(data=DataConfig(dataset="hf", data_path=given))
        assert without_paths(config).data.data_path == kept


def test_a_pushed_model_can_be_loaded(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "me/tiny", "--private"]) == 0
    printed = capsys.readouterr()
    assert "https://hub.test/me/tiny  (license mit)" in printed.out
    assert hub.private["me/tiny"]
    files = hub.repos["me/tiny"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]

    for content in (*files.values(), printed.out.encode(), printed.err.encode()):
        assert b"/home/me" not in content
        assert str(run.parent).encode() not in content
    card = files["README.md"].decode()
    for words in (
        "license: mit", "library_name: vitrail", "uoft-cs/cifar10", "value: 0.7", "70.00%",
        "66.00% to 74.00%", "ant, bee, cow", "starting from start.safetensors", "| seed | 77 |",
        "error | 0.0300", "without calibration | 0.0800", "fitted on validation | 0.610",
        "label smoothing, undone first | 0.1 |",
        'vitrail.load("hf:me/tiny")', "## Limits", "| learning_rate | 0.0005 |",
    ):  # fmt: skip
        assert words in card, words

    def same_as_the_run() -> bool:
        theirs = vitrail.load("hf:me/tiny", device="cpu")
        ours = vitrail.load(run, device="cpu")
        assert theirs.classes == ours.classes
        assert theirs.config.model == ours.config.model
        assert theirs.calibration == ours.calibration == Calibration(0.61)
        weights = ours.model.state_dict()
        return all(torch.equal(t, weights[k]) for k, t in theirs.model.state_dict().items())

    assert same_as_the_run()
    assert main(["info", "hf:me/tiny"]) == 0
    hub.online = False
    assert same_as_the_run()  # from the cache, without the hub
    with pytest.raises(CheckpointError, match=r"^hf:me/other: .*not cached"):
        vitrail.load("hf:me/other")


def test_models_of_others_can_be_loaded(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    about = {
        "model_type": "vit",
        "num_attention_heads": 3,
        "layer_norm_eps": 1e-6,
        "image_size": 15,
    }
    hub.repos["them/vit"] = {
        "config.json": json.dumps(about).encode(),
        "model.safetensors": save(make_state("huggingface")),
        "pytorch_model.bin": b"not requested",
    }
    classifier = vitrail.load("hf:them/vit", device="cpu")
    assert classifier.config.model.n_attention_heads == 3
    assert not (hub.cache / "them/vit/pytorch_model.bin").exists()
    assert main(["push", "hf:them/vit", "me/copy"]) == 2
    assert "give --license" in capsys.readouterr().err


def test_settings_and_weights_of_two_models_are_refused(hub: Hub, run: Path) -> None:
    assert main(["push", str(run), "hf:me/tiny"]) == 0
    files = hub.repos["me/tiny"]
    files["config.json"] = files["config.json"].replace(b'"bee"', b'"wasp"')
    with pytest.raises(CheckpointError, match="describe different models"):
        vitrail.load("hf:me/tiny")


@pytest.mark.parametrize(
    ("name", "words"),
    [("hf:me/nothing", "no such model on the hub"), ("hf:no/such/id", "not a hub id")],
)
def test_a_missing_model_is_reported_in_one_line(hub: Hub, name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as refusal:
        vitrail.load(name)
    assert "\n" not in str(refusal.value)


def test_pushing_without_permission_is_one_line(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.logged_in = False
    assert main(["push", str(run), "me/tiny"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert "me/tiny" not in hub.repos


def test_a_missing_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ConfigError, match=r'huggingface_hub is not installed: pip install -e "\.\[hub\]"'
    ):
        vitrail.load("hf:me/tiny")


def test_the_revision_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, Any]] = []

    class Client:
        def snapshot_download(self, name: str, *, revision: Any, allow_patterns: Any) -> str:
            asked.append((name, revision))
            return str(tmp_path)

    monkeypatch.setattr("vitrail.weights.hub.hub_api", Client)
    download("hf:me/tiny@v1.0")
    download("hf:me/tiny")
    assert asked == [("me/tiny", "v1.0"), ("me/tiny", None)]
