"""A run on a folder of pictures: its manifest, its splits, changes between two commands."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitrail
from vitrail.config.files import from_json, read_json
from vitrail.config.settings import Config, DataConfig
from vitrail.data import datasets
from vitrail.data.manifest import load_manifest
from vitrail.errors import ConfigError, DataError
from vitrail.training.run import Run
from vitrail.training.run_folder import load_split

pytestmark = pytest.mark.usefixtures("rough_plots")


def draw(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (level, 255 - level, 40)).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of twelve pictures."""
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(12):
            draw(tmp_path / "pictures" / name / f"{number:02}.png", 70 * label + number)
    return tmp_path / "pictures"


@pytest.fixture
def config(tiny_run: Config, pictures: Path) -> Config:
    data = DataConfig(dataset="folder", data_path=pictures)
    training = dataclasses.replace(tiny_run.training, epochs=1, warmup_epochs=0, batch_size=9)
    return dataclasses.replace(tiny_run, data=data, training=training)


def run_to_the_end(config: Config, folder: Path) -> dict[str, object]:
    folder.mkdir()
    run = Run.start(config, folder)
    for _ in run.train():
        pass
    return run.finish()


def resume(folder: Path, **data: object) -> Run:
    config = from_json(read_json(folder / "config.json"))
    moved = dataclasses.replace(config.data, **data)  # type: ignore[arg-type]
    return Run.resume(folder, dataclasses.replace(config, data=moved))


def test_a_run_keeps_the_manifest_of_its_data(config: Config, tmp_path: Path) -> None:
    (config.data.data_path / "ant/film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (config.data.data_path / "bee/05.png").write_text("no picture")
    (config.data.data_path / "bee/06.png").write_text("no picture")
    result = run_to_the_end(config, tmp_path / "run")
    manifest = load_manifest(tmp_path / "run")
    sizes = {split: len(files) for split, files in manifest.files.items()}
    assert sizes["train"] == result["train_images"]
    assert sum(sizes.values()) + len(manifest.left_out["broken"]) == 36
    assert {name for names in manifest.left_out.values() for name in names} >= {"ant/film.mp4"}
    assert result["test"]["images"] == sizes["test"]  # type: ignore[index]


def test_resume_uses_the_files_of_the_manifest(config: Config, tmp_path: Path) -> None:
    run_to_the_end(config, tmp_path / "run")
    pictures = config.data.data_path
    for number in range(40):
        draw(pictures / "bee" / f"new-{number}.png", number)
    draw(pictures / "aaa" / "1.png", 1)
    run = resume(tmp_path / "run")
    assert run.classes == ("ant", "bee", "cat")
    assert run.train_images == len(load_manifest(tmp_path / "run").files["train"])
    assert "ignored 41 pictures that were added since the run began" in run.notices
    shutil.copytree(pictures, tmp_path / "moved")
    (pictures / "cat" / "03.png").unlink()
    with pytest.raises(DataError, match=r"the files changed .* 1 missing \(cat/03.png\)"):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run", data_path=tmp_path / "moved").train_images == run.train_images


def test_a_run_without_a_test_split_has_a_result(config: Config, tmp_path: Path) -> None:
    (tmp_path / "splits").mkdir()
    shutil.copytree(config.data.data_path, tmp_path / "splits/train")
    shutil.copytree(config.data.data_path, tmp_path / "splits/val")
    data = dataclasses.replace(config.data, data_path=tmp_path / "splits")
    result = run_to_the_end(dataclasses.replace(config, data=data), tmp_path / "run")
    assert result["test"] is None
    assert json.loads((tmp_path / "run/result.json").read_text())["test"] is None
    assert not (tmp_path / "run/test_uses.jsonl").exists()
    assert result["train_images"] == 36
    classifier = vitrail.load(tmp_path / "run")
    with pytest.raises(DataError, match="there is no test split: give --split validation"):
        load_split(classifier, "test")
    assert len(load_split(classifier, "validation")) == 36
    (tmp_path / "other").mkdir()
    monitored = dataclasses.replace(config.run, monitor="test")
    with pytest.raises(ConfigError, match="monitor is test, but there is no test split"):
        Run.start(dataclasses.replace(config, data=data, run=monitored), tmp_path / "other")


def test_testing_uses_the_runs_split_or_all_of_another_folder(
    config: Config, tmp_path: Path
) -> None:
    run_to_the_end(config, tmp_path / "run")
    classifier = vitrail.load(tmp_path / "run")
    before = load_split(classifier, "test").raw_BCHW
    for number in range(60):
        draw(config.data.data_path / "bee" / f"new-{number}.png", number)
    assert load_split(classifier, "test").raw_BCHW.equal(before)
    checkpoint = next((tmp_path / "run/checkpoints").glob("step-*"))
    assert load_split(vitrail.load(checkpoint), "test").raw_BCHW.equal(before)
    for number in range(7):
        draw(tmp_path / "other/cat" / f"{number}.png", number)
    other = load_split(classifier, "test", data_path=tmp_path / "other")
    assert (len(other), other.classes) == (7, ("ant", "bee", "cat"))


def test_the_subsets_of_the_training_do_not_apply_to_another_folder(
    config: Config, tmp_path: Path
) -> None:
    data = dataclasses.replace(config.data, num_train_images=20, validation_images=4)
    run_to_the_end(dataclasses.replace(config, data=data), tmp_path / "run")
    classifier = vitrail.load(tmp_path / "run")
    for split in ("train", "val"):
        shutil.copytree(config.data.data_path, tmp_path / "other" / split)
        for number, path in enumerate((tmp_path / "other" / split).rglob("*.png")):
            draw(path, 100 + number)  # so that it is no copy of the training's pictures
    other = {"data_path": tmp_path / "other"}
    assert len(load_split(classifier, "validation")) == 4
    assert len(load_split(classifier, "validation", **other)) == 36
    assert len(load_split(classifier, "train", **other)) == 36
    assert len(load_split(classifier, "train", num_train_images=10, **other)) == 10


def test_a_resumed_run_can_be_tested_from_any_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    run = Run.start(config, tmp_path / "run")
    next(run.train())
    run.save()
    del run
    shutil.move(config.data.data_path, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    resumed = resume(tmp_path / "run", data_path=Path("moved"))
    for _ in resumed.train():
        pass
    resumed.finish()
    monkeypatch.chdir(tmp_path.parent)
    assert len(load_split(vitrail.load(tmp_path / "run"), "test")) > 0


def test_the_range_of_wide_pictures_is_the_trainings(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(12):
            level = np.full((32, 32), 300 * label + number, np.uint16)
            path = tmp_path / "wide" / name / f"{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(level).save(path)
    data = dataclasses.replace(config.data, data_path=tmp_path / "wide")
    with caplog.at_level(logging.INFO, "vitrail"):
        run_to_the_end(dataclasses.replace(config, data=data), tmp_path / "run")
    assert from_json(read_json(tmp_path / "run/config.json")).data.pixel_range == (0, 1023)
    images = load_split(vitrail.load(tmp_path / "run"), "test")
    top = int(images.raw_BCHW[images.labels_B == 2].max())
    assert abs(top - 605 * 255 / 1023) < 3


def test_images_that_cannot_fit_in_memory_are_refused_with_numbers(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "available_memory", lambda: 100_000)
    model = dataclasses.replace(config.model, image_size=64)
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=r"^33 images of 64 x 64 pixels need 0\.0 GiB of memory"):
        Run.start(dataclasses.replace(config, model=model), tmp_path / "run")
    monkeypatch.setattr(datasets, "available_memory", lambda: None)
    datasets.require_memory(10**9, (10**4, 10**4), 3)


def test_free_memory_is_the_least_of_what_the_limits_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (
        ("memory.max", "5000\n"),
        ("memory.current", "4100\n"),
        ("memory.stat", "anon 3000\ninactive_file 1000\n"),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2 kB\n")
    monkeypatch.setattr(datasets, "CGROUP", tmp_path)
    monkeypatch.setattr(datasets, "MEMORY", tmp_path / "meminfo")
    assert datasets.available_memory() == 1900
    (tmp_path / "memory.max").write_text("max\n")
    assert datasets.available_memory() == 2048
    monkeypatch.setattr(datasets, "MEMORY", tmp_path / "none")
    assert datasets.available_memory() is None
