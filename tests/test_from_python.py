"""vitrail.train: arrays, tensors, Datasets and paths; the run folder; what the model then does."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail as package
from vitrail.cli import main
from vitrail.config.settings import Config, ModelConfig
from vitrail.errors import ConfigError, DataError
from vitrail.model.vit import VisionTransformer
from vitrail.training.run import Run
from vitrail.training.run_folder import load_split

pytestmark = pytest.mark.usefixtures("rough_plots")

TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "embed_dim": 16, "n_layers": 1, "n_attention_heads": 2,
    "stem": "patch", "epochs": 8, "batch_size": 10, "crop_padding": 0, "flip": "none",
    "num_workers": 1,
}  # fmt: skip
LABELS = np.arange(60) % 2
PICTURES = np.random.default_rng(0).uniform(0, 4, (60, 8, 8))
PICTURES[LABELS == 1, 2:6, 2:6] += 12.0
"""Gray values from 0 to 16; class 1 has a bright square."""


class Pairs(torch.utils.data.Dataset[tuple[Any, int]]):
    """Pictures in some form, with their labels and the names of the classes."""

    classes = ("dark", "bright")

    def __init__(self, convert: Callable[[np.ndarray], Any]) -> None:
        self.convert = convert

    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.convert((PICTURES[index] * 15.9).astype(np.uint8)), int(LABELS[index])


def test_arrays_train_a_model_that_reads_their_numbers(tmp_path: Path) -> None:
    model = package.train((PICTURES, LABELS), **TINY)
    assert model.result is not None
    assert model.result["test"]["accuracy"] == 1.0
    assert model.result["test"]["images"] == 6
    assert model.classes == ("0", "1")
    assert model.config.model.n_channels == 1
    assert model.config.data.pixel_range[0] < 0.1 < 15 < model.config.data.pixel_range[1]
    found = [ranking[0].name for ranking in model.predict(list(PICTURES[:20]), top_k=1)]
    assert found == [str(label) for label in LABELS[:20]]
    assert repr(model).startswith("Classifier('', 2 classes")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "channels"),
    [
        (Pairs(Image.fromarray), 1),
        (Pairs(lambda raw: Image.fromarray(raw.astype(np.uint16) * 99)), 1),
        (Pairs(lambda raw: Image.fromarray(raw).convert("RGB")), 3),
        (Pairs(lambda raw: torch.from_numpy(raw / 255).float().expand(3, 8, 8)), 3),
        ((torch.from_numpy(PICTURES).unsqueeze(1), torch.from_numpy(LABELS)), 1),
        ((list(PICTURES), LABELS.tolist()), 1),
        ((PICTURES, np.array(["dark", "bright"], dtype=object)[LABELS]), 1),
    ],
    ids=["pillow", "wide", "color", "tensors", "tensor", "lists", "names"],
)
def test_data_of_every_form(form: Any, channels: int) -> None:
    model = package.train(form, **TINY | {"epochs": 1})
    assert model.config.model.n_channels == channels
    assert model.result is not None
    assert model.result["train_images"] == 49
    assert set(model.classes) in ({"0", "1"}, {"dark", "bright"})
    assert isinstance(form, tuple) or model.classes == ("dark", "bright")


def test_given_splits_and_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = package.train(
        (PICTURES, LABELS), validation=(PICTURES[:8], LABELS[:8]), test=(PICTURES[:4], LABELS[:4]),
        classes=["no", "yes"], folder_name="mine", **TINY,
    )  # fmt: skip
    folder = tmp_path / "output" / "mine"
    result = json.loads((folder / "result.json").read_text())
    assert result == model.result
    assert result["train_images"] == 60
    assert result["test"]["images"] == 4
    assert model.classes == ("no", "yes")
    capsys.readouterr()
    assert main(["test", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4
    again = package.load()  # the newest run
    assert again.source == "output/mine"
    assert again.predict(PICTURES[0])[0][0].name == "no"
    with pytest.raises(ConfigError, match="already exists"):
        package.train((PICTURES, LABELS), folder_name="mine", **TINY)


def test_a_run_refuses_other_arrays_and_finds_its_own_where_it_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package.train((PICTURES, LABELS), test=(PICTURES[:4], LABELS[:4]), folder_name="mine", **TINY)
    moved = (tmp_path / "output" / "mine").rename(tmp_path / "moved")
    known = json.loads((moved / "data.json").read_text())
    assert set(known) == {"train", "test"}
    assert known["train"].startswith("60-")
    model = package.load(moved)
    assert len(load_split(model, "validation")) == 6
    with np.load(moved / "data.npz") as file:
        arrays = dict(file)
    for name, change in (("labels", lambda x: 1 - x), ("images", lambda x: x[::-1])):
        np.savez(moved / "data.npz", **arrays | {f"train_{name}": change(arrays[f"train_{name}"])})
        assert len(load_split(model, "test")) == 4  # unchanged
        with pytest.raises(DataError, match="the train images or labels changed since the run"):
            load_split(model, "validation")
        with pytest.raises(DataError, match="the train images or labels changed since the run"):
            Run.resume(moved, model.config)
    with pytest.raises(DataError, match=r"nowhere.data\.npz"):  # not the run's own instead
        load_split(model, "validation", data_path=Path("nowhere/data.npz"))
    np.savez(moved / "data.npz", **arrays)
    assert Run.resume(moved, model.config).rows[-1]["epoch"] == 8


def test_a_path_trains_as_the_command_does(tmp_path: Path) -> None:
    for number, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        file = tmp_path / "files" / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 15.9).astype(np.uint8)).save(file)
    np.savez(tmp_path / "data.npz", images=PICTURES, labels=LABELS)
    for path, channels in ((tmp_path / "files", 3), (str(tmp_path / "data.npz"), 1)):
        model = package.train(path, **TINY | {"epochs": 1})
        assert model.config.model.n_channels == channels
        assert model.result is not None
        assert model.result["test"]["images"] == 6


def test_weights_set_the_architecture_as_in_the_command() -> None:
    settings = {"epochs": 1, "batch_size": 60, "num_workers": 1, "image_size": 32}
    pictures = np.repeat(PICTURES[..., None] / 16, 3, axis=3)
    model = package.train((pictures, LABELS), init="cifar10-vit", new_head=True, **settings)
    theirs = package.load("cifar10-vit").config
    assert model.config.model == dataclasses.replace(theirs.model, n_classes=2)
    assert model.config.data.mean == theirs.data.mean


@pytest.mark.slow
def test_handwritten_digits_are_learned() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    model = package.train((digits.images, digits.target), epochs=15, flip="none")
    assert model.result is not None
    assert model.result["test"]["accuracy"] >= 0.97


def test_features_are_what_the_head_classifies() -> None:
    model = package.load("cifar10")
    pictures = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)
    vectors_BD = model.features(pictures, batch_size=2)
    assert vectors_BD.shape == (3, model.config.model.embed_dim)
    with torch.inference_mode():
        logits_BY = model.model.head(vectors_BD)
    assert torch.allclose(logits_BY, model.logits(model.prepare(pictures)), atol=1e-5)
    assert model.features([]).shape == (0, model.config.model.embed_dim)


def test_features_of_no_pictures_are_as_wide_as_those_of_one() -> None:
    config = ModelConfig(
        n_classes=3, embed_dim=8, n_layers=1, n_attention_heads=2, pool="cls_mean"
    )  # fmt: skip
    network = VisionTransformer(config).eval()
    model = package.Classifier(network, Config(model=config), tuple("abc"), "made")
    assert model.features([np.zeros((32, 32, 3), np.uint8)]).shape == (1, 16)
    assert model.features([]).shape == (0, 16)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ((PICTURES, LABELS), {"epoch": 3}, r"unknown setting 'epoch' \(did you mean 'epochs'"),
        ((PICTURES, LABELS), {"preset": "quik"}, "unknown preset"),
        ((PICTURES, LABELS[:-1]), {}, "60 pictures, but 59 labels"),
        ((PICTURES.reshape(60, 64), LABELS), {}, "reshape it to"),
        (PICTURES, {}, "the data is a ndarray: give"),
        (5, {}, "the data is a int: give"),
        ([(PICTURES[0], 0, 1)] * 3, {}, "pairs"),
        (([PICTURES[0], PICTURES[1, 2:]], [0, 1]), {}, "2 shapes"),
        ((PICTURES, np.where(LABELS, None, 1)), {}, "labels of type object"),
        ("nothing/there", {}, "no such file or folder of data"),
        ("nothing/there", {"dataset": "folder"}, "nothing/there"),
        ("nothing/there", {"data_path": "elsewhere"}, "leave out data_path"),
        ((PICTURES, LABELS), {"dataset": "cifar10"}, "leave out data_path, and dataset"),
        ("nothing/there", {"test": (PICTURES, LABELS)}, "a path has its own splits"),
    ],
)
def test_mistakes_are_explained(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        package.train(data, **settings)
