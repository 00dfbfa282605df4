"""Models on the hub, simulated by a local server: pushing, loading, errors."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import vitrail
from hub_stand_in import Hub, running
from layouts import make_state
from vitrail.cli import main
from vitrail.config.settings import Config, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.model.vit import VisionTransformer
from vitrail.runtime.files import write_json
from vitrail.weights.checkpoint import CheckpointInfo, save_checkpoint, write_pointer

constants = pytest.importorskip("huggingface_hub.constants")
utils = pytest.importorskip("huggingface_hub.utils")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""The hub's client uses a deprecated argument of its HTTP library."""
TOKEN = "hf_" + "NobodyMaySeeThis"


def redirect(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the hub's client to this address, as HF_ENDPOINT does at import."""
    files = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A local server that the hub's client uses, with its own cache."""
    with running(TOKEN) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        redirect(server.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        utils.disable_progress_bars()
        yield server


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
        config, ("ant", "bee", "cow", "dog", "eel", "fox", "gnu"), {"step": 9}, {}
    )
    save_checkpoint(folder, info, weights=weights, training={})
    write_pointer(folder.parent, "BEST", folder)
    test = {
        "accuracy": 0.7, "accuracy_interval": [0.66, 0.74], "loss": 0.91, "images": 500,
        "expected_calibration_error": 0.03,
    }  # fmt: skip
    result = {"test": test, "epochs": 3, "train_images": 90, "seconds": 4.0, "parameters": 123}
    write_json(tmp_path / "run" / "result.json", result)
    return tmp_path / "run"


def test_a_pushed_model_can_be_loaded(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["push", str(run), "me/tiny", "--private"]) == 0
    printed = capsys.readouterr()
    assert f"{hub.url}/me/tiny  (license mit)" in printed.out
    assert hub.private["me/tiny"]
    files = hub.repos["me/tiny"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert any("lfs/objects/batch" in request for request in hub.seen)

    for content in (*files.values(), printed.out.encode(), printed.err.encode()):
        assert TOKEN.encode() not in content
        assert b"/home/me" not in content
        assert str(run.parent).encode() not in content
    card = files["README.md"].decode()
    for words in (
        "license: mit", "library_name: vitrail", "uoft-cs/cifar10", "value: 0.7", "70.00%",
        "66.00% to 74.00%", "ant, bee, cow", "starting from start.safetensors", "| seed | 77 |",
        'vitrail.load("hf:me/tiny")', "## Limits", "| learning_rate | 0.0005 |",
    ):  # fmt: skip
        assert words in card, words

    def same_as_the_run() -> bool:
        theirs = vitrail.load("hf:me/tiny", device="cpu")
        ours = vitrail.load(run, device="cpu")
        assert theirs.classes == ours.classes
        assert theirs.config.model == ours.config.model
        weights = ours.model.state_dict()
        return all(torch.equal(t, weights[k]) for k, t in theirs.model.state_dict().items())

    assert same_as_the_run()
    assert main(["info", "hf:me/tiny"]) == 0
    redirect("http://127.0.0.1:9", monkeypatch)
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
    assert not any("pytorch_model.bin" in request for request in hub.seen)
    assert main(["push", "hf:them/vit", "me/copy"]) == 2
    assert "give --license" in capsys.readouterr().err


def test_settings_and_weights_of_two_models_are_refused(hub: Hub, run: Path) -> None:
    assert main(["push", str(run), "hf:me/tiny"]) == 0
    files = hub.repos["me/tiny"]
    files["config.json"] = files["config.json"].replace(b'"bee"', b'"wasp"')
    with pytest.raises(CheckpointError, match="are of different models"):
        vitrail.load("hf:me/tiny")


@pytest.mark.parametrize(
    ("name", "words"),
    [("hf:me/nothing", "no such model on the hub"), ("hf:no/such/id", "not a hub id")],
)
def test_a_missing_model_is_reported_in_one_line(hub: Hub, name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as refusal:
        vitrail.load(name)
    assert "\n" not in str(refusal.value)


def test_a_wrong_token_cannot_push(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(run), "me/tiny"]) == 2
    printed = capsys.readouterr().err
    assert "hf auth login" in printed
    assert "hf_wrong" not in printed
    assert "me/tiny" not in hub.repos


def test_a_missing_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ConfigError, match=r'huggingface_hub is not installed: pip install -e "\.\[hub\]"'
    ):
        vitrail.load("hf:me/tiny")
