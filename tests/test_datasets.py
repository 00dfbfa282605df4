"""Loading the splits of every dataset."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.config.settings import DataConfig
from vitrail.data import datasets
from vitrail.data.datasets import load_data
from vitrail.data.images import ImageSet
from vitrail.data.pictures import Framing
from vitrail.errors import ConfigError, DataError


def colored(count: int, seed: int) -> ImageSet:
    """Images of noise with a bright square that the masks mark; 7 classes."""
    generator = torch.Generator().manual_seed(seed)
    raw_BCHW = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    masks_BHW = torch.zeros(count, 32, 32, dtype=torch.bool)
    masks_BHW[:, 4:20, 8:30] = True
    classes = tuple(f"class {number}" for number in range(7))
    return ImageSet(raw_BCHW, torch.arange(count) % 7, classes, masks_BHW)


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ImageSet]:
    """The files' two parts of ``shapes``, and a list of those that were opened."""
    files = {"train": colored(97, 1), "test": colored(41, 2)}
    monkeypatch.setattr(datasets, "load_shapes", lambda part: files[part])
    return files


def test_splits_validation_from_the_training_part(parts: dict[str, ImageSet]) -> None:
    loaded = load_data(DataConfig(validation_images=15), ["train", "validation", "test"]).images
    assert {split: len(images) for split, images in loaded.items()} == {
        "train": 82,
        "validation": 15,
        "test": 41,
    }
    both = torch.cat([loaded["train"].raw_BCHW, loaded["validation"].raw_BCHW])
    assert len(torch.cat([both, parts["train"].raw_BCHW]).flatten(1).unique(dim=0)) == 97
    assert torch.equal(loaded["test"].raw_BCHW, parts["test"].raw_BCHW)


def test_subsets_are_the_same_images_at_every_size() -> None:
    config = DataConfig(num_train_images=31, num_test_images=21)
    for split in ("train", "test"):
        at_32, at_16 = (
            load_data(config, [split], image_hw=(side, side)).images[split] for side in (32, 16)
        )
        halved = at_32.resized((16, 16), Framing())
        assert torch.equal(at_16.raw_BCHW, halved.raw_BCHW)


def test_subsets_are_stratified_and_independent_of_order(parts: dict[str, ImageSet]) -> None:
    config = DataConfig(validation_images=0, num_train_images=31, num_test_images=21)
    loaded = load_data(config, ["train", "validation", "test"]).images
    assert loaded["train"].labels_B.bincount().tolist() == [5, 5, 5, 4, 4, 4, 4]
    assert loaded["test"].labels_B.bincount().tolist() == [3] * 7
    assert loaded["validation"].raw_BCHW.shape == (0, 3, 32, 32)
    by_class = parts["train"].labels_B.sort(stable=True).indices  # as folders are listed
    parts["train"] = parts["train"].take(by_class)
    again = load_data(config, ["train"]).images["train"]
    for label in range(7):
        images = [s.raw_BCHW[s.labels_B == label].flatten(1) for s in (loaded["train"], again)]
        assert len(torch.cat(images).unique(dim=0)) == len(images[0]) == len(images[1])


def test_validation_does_not_change_with_the_training_images() -> None:
    few = load_data(DataConfig(num_train_images=20), ["train", "validation"]).images
    assert len(few["train"]) == 20
    all_of_it = load_data(DataConfig(), ["validation"]).images
    assert torch.equal(few["validation"].raw_BCHW, all_of_it["validation"].raw_BCHW)


def test_opens_the_test_part_only_if_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(datasets, "load_shapes", lambda part: opened.append(part) or colored(41, 3))
    assert set(load_data(DataConfig(), ["train"]).images) == {"train"}
    assert set(load_data(DataConfig(), ["validation"]).images) == {"validation"}
    assert opened == ["train", "train"]
    assert set(load_data(DataConfig(), ["test"]).images) == {"test"}
    assert opened == ["train", "train", "test"]


def test_resizes_images_and_masks_together(parts: dict[str, ImageSet]) -> None:
    raw_BCHW, masks_BHW = parts["test"].raw_BCHW, parts["test"].masks_BHW
    assert masks_BHW is not None
    raw_BCHW[masks_BHW[:, None].expand_as(raw_BCHW)] = 255
    raw_BCHW[~masks_BHW[:, None].expand_as(raw_BCHW)] = 0
    for fit in ("crop", "pad", "squash"):
        config = DataConfig(fit=fit)  # type: ignore[arg-type]
        images = load_data(config, ["test"], image_hw=(20, 28)).images["test"]
        assert images.raw_BCHW.shape == (41, 3, 20, 28)
        assert images.masks_BHW is not None
        assert torch.equal(images.masks_BHW, images.raw_BCHW[:, 0] >= 128)
        assert 0 < images.masks_BHW.float().mean() < 1


def test_converts_to_gray_as_pillow_does(parts: dict[str, ImageSet]) -> None:
    images = load_data(DataConfig(), ["test"], n_channels=1).images["test"]
    expected = [
        np.asarray(Image.fromarray(raw_HWC).convert("L"))
        for raw_HWC in parts["test"].raw_BCHW.permute(0, 2, 3, 1).numpy()
    ]
    assert np.array_equal(images.raw_BCHW[:, 0].numpy(), np.stack(expected))
    assert images.raw_BCHW.shape == (41, 1, 32, 32)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_loads_cifar(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_cifar(*words: str, data_path: Path) -> ImageSet:
        asked.append((*words, data_path))
        return colored(41, 5)

    monkeypatch.setattr(datasets, "load_cifar", load_cifar)
    config = DataConfig(dataset=dataset, data_path=Path("there"))  # type: ignore[arg-type]
    assert len(load_data(config, ["train", "test"]).images["test"]) == 41
    assert asked == [(dataset, "train", Path("there")), (dataset, "test", Path("there"))]


def test_loads_folders(tmp_path: Path) -> None:
    for name, level in (("dark", 20), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(11):
            Image.new("RGB", (40, 20), (level,) * 3).save(tmp_path / name / f"{number}.png")
    config = DataConfig(dataset="folder", data_path=tmp_path, fit="pad", validation_images=4)
    loaded = load_data(config, ["train", "validation", "test"], image_hw=(12, 8)).images
    assert [len(loaded[split]) for split in ("train", "validation", "test")] == [16, 4, 2]
    assert loaded["train"].labels_B.bincount().tolist() == [8, 8]
    assert loaded["test"].classes == ("dark", "light")
    assert loaded["test"].raw_BCHW[:, 0, :, 3].tolist() == [
        [0] * 4 + [level] * 4 + [0] * 4 for level in (20, 200)
    ]


def test_one_range_of_wide_gray_values_holds_for_all_splits(tmp_path: Path) -> None:
    levels = {"train/dark": 0, "train/light": 4000, "test/dark": 0, "test/light": 1000}
    for name, level in levels.items():
        (tmp_path / name).mkdir(parents=True)
        for number in range(3):
            picture = Image.fromarray(np.full((8, 8), level, np.uint16))
            picture.save(tmp_path / name / f"{number}.tif")
    config = DataConfig(dataset="folder", data_path=tmp_path, validation_images=0)
    inferred = load_data(config, ["train", "test"], image_hw=(8, 8))
    given = load_data(replace(config, pixel_range=(0, 2000)), ["test"], image_hw=(8, 8))
    assert inferred.pixel_range == (0, 4095)
    assert given.pixel_range == (0, 2000)
    for loaded in (inferred, given):
        brightest = int(loaded.images["test"].raw_BCHW.max())
        assert brightest == pytest.approx(1000 / loaded.pixel_range[1] * 255, abs=1)


def test_refuses_training_images_of_one_class_and_too_much_validation() -> None:
    with pytest.raises(DataError, match=r"^all 1 training images belong to one class$"):
        load_data(DataConfig(num_train_images=1), ["train"])
    with pytest.raises(ConfigError, match=r"^validation_images is 97, but there are 97 "):
        load_data(DataConfig(validation_images=97), ["train"])
