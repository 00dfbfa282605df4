"""Parquet, Arrow and the hub, by the datasets library: pixels, columns, errors."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.config.settings import DataConfig
from vitrail.data.datasets import load_data
from vitrail.data.images import ImageSet
from vitrail.data.sources import open_source, recognize
from vitrail.errors import DataError

datasets = pytest.importorskip("datasets")
SIZES = ((9, 9), (12, 7), (9, 20))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own cache, and no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def encoded(number: int, mode: str = "L") -> bytes:
    """The content of a PNG of noise, of varying size."""
    noise = np.random.default_rng(number).integers(0, 256, SIZES[number % 3], np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, "PNG")
    return file.getvalue()


def table(count: int = 12, mode: str = "L", **columns: Any) -> Any:
    """A split of pictures with their classes, and other columns."""
    labels = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    rows = [{"bytes": encoded(number, mode), "path": None} for number in range(count)]
    made = datasets.Dataset.from_dict(
        {"image": rows, "label": [n % 2 for n in range(count)]}, features=features
    )  # fmt: skip
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


def write_parquet(folder: Path, **splits: Any) -> Path:
    """Files as the hub has them."""
    folder.mkdir()
    for name, data in splits.items():
        data.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def write_saved(folder: Path, **splits: Any) -> Path:
    """What save_to_disk writes."""
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def load(path: Path | str, split: str = "train", n_channels: int = 1, **settings: Any) -> ImageSet:
    """A split at 8 x 8 pixels."""
    given = {"validation_images": 0, **settings}
    config = DataConfig(dataset="hf", data_path=Path(path), **given)
    return load_data(config, [split], image_hw=(8, 8), n_channels=n_channels).images[split]


@pytest.mark.parametrize("write", [write_parquet, write_saved])
def test_pixels_are_those_of_a_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "table", train=table(), test=table(4))
    for number in range(16):  # 12 for training, 4 for the test
        split, label = ("train", "test")[number // 12], ("cat", "dog")[number % 2]
        file = tmp_path / "files" / split / label / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(number % 12))
    config = DataConfig(dataset="folder", data_path=tmp_path / "files", validation_images=0)
    for split in ("train", "test"):
        files = load_data(config, [split], image_hw=(8, 8), n_channels=1).images[split]
        images = load(path, split)
        order_B = images.labels_B.argsort(stable=True)
        assert torch.equal(images.raw_BCHW[order_B], files.raw_BCHW)
        assert images.classes == files.classes == ("cat", "dog")
    assert recognize(path) == "hf"
    assert open_source(DataConfig(dataset="hf", data_path=path)).gray


def test_one_file_is_split_by_the_program_and_color_stays_color(tmp_path: Path) -> None:
    table(40, "RGB").to_parquet(tmp_path / "all.parquet")
    parts = [load(tmp_path / "all.parquet", split, 3, validation_images=None)
             for split in ("train", "validation", "test")]  # fmt: skip
    assert [len(part) for part in parts] == [33, 3, 4]
    source = open_source(DataConfig(dataset="hf", data_path=tmp_path / "all.parquet"))
    assert not source.gray


def test_the_hub_is_asked_for_name_configuration_and_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(**options: str) -> dict[str, Any]:
        asked.append(options)
        secret = table(4).remove_columns("label").add_column("label", [-1] * 4)
        return {"train": table(), "valid": table(4), "test": secret}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("hf:ylecun/mnist", "validation", validation_images=None)) == 4
    load("hf:nelorth/oxford:small@v1.0")
    assert asked == [{"path": "ylecun/mnist", "name": None, "revision": None},
                     {"path": "nelorth/oxford", "name": "small", "revision": "v1.0"}]  # fmt: skip
    with pytest.raises(DataError, match="there is no test split"):  # its labels are secret
        load("hf:ylecun/mnist", "test")


def test_columns_are_found_by_their_types_or_usual_names(tmp_path: Path) -> None:
    plain = table().remove_columns("label").add_column("class", ["no", "yes"] * 6)
    path = write_parquet(tmp_path / "names", train=plain, test=plain)
    assert load(path).classes == ("no", "yes")
    content = [encoded(number) for number in range(12)]
    raw = datasets.Dataset.from_dict({"image": content, "y": [0, 1] * 6})
    assert torch.equal(load(write_parquet(tmp_path / "raw", train=raw, test=raw)).raw_BCHW,
                       load(path).raw_BCHW)  # fmt: skip
    two = table().add_column("photo", content).rename_column("image", "scan")
    with pytest.raises(DataError, match="2 columns of pictures among scan, label, photo: rename"):
        load(write_parquet(tmp_path / "two", train=two))
    none = table().remove_columns("label")
    with pytest.raises(DataError, match="no column of labels among image: rename one to label"):
        load(write_parquet(tmp_path / "none", train=none))


def test_broken_pictures_are_left_out_and_broken_files_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = [encoded(number) if number != 3 else b"not a picture" for number in range(12)]
    raw = datasets.Dataset.from_dict({"image": content, "label": [0, 1] * 6})
    images = load(write_parquet(tmp_path / "one", train=raw, test=raw))
    assert len(images) == len(images.labels_B) == 11
    assert "left out: picture 3" in caplog.text
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.parquet").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(DataError, match="cannot be read by the datasets library"):
        load(broken)
    with pytest.raises(DataError, match="no such file or folder; for the hub, give hf:OWNER/NAME"):
        load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read by the datasets library"):
        load(tmp_path / "empty")
