"""The pictures of a manifest, decoded."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from vitrail.config.settings import DataConfig
from vitrail.data.datasets import Loaded, load_data
from vitrail.data.manifest import scan
from vitrail.errors import DataError


def draw(path: Path, level: int, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Path:
    """A uniform gray picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).convert(mode).save(path)
    return path


def load(data_path: Path, split: str, n_channels: int = 3) -> Loaded:
    config = DataConfig(dataset="folder", data_path=data_path, fit="squash", num_workers=3)
    return load_data(config, [split], image_hw=(5, 11), n_channels=n_channels)  # type: ignore[list-item]


def levels(loaded: Loaded) -> list[int]:
    """The grays of the pictures, which identify them."""
    (images,) = loaded.images.values()
    return images.raw_BCHW[:, 0, 0, 0].tolist()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Classes of 23, 7 and 2 pictures, each of its own gray."""
    level = 0
    for name, count in (("dog", 23), ("cat", 7), ("ant", 2)):
        for number in range(count):
            level += 5
            draw(tmp_path / name / f"{number}.png", level)
    return tmp_path


def test_pictures_of_any_size_and_mode_are_read_with_their_labels(tmp_path: Path) -> None:
    for which, modes in (("train", ("RGB", "L", "P", "RGBA")), ("test", ("1", "LA"))):
        for number, mode in enumerate(modes):
            size = (3 + 4 * number, 17 - 5 * number)
            draw(tmp_path / which / "white" / "deeper" / f"{number}.png", 255, mode, size)
            draw(tmp_path / which / "black" / f"{number}.PNG", 0, mode, size)
    for split, each in (("train", 4), ("test", 2)):
        loaded = load(tmp_path, split)
        images = loaded.images[split]  # type: ignore[index]
        assert images.classes == ("black", "white")
        assert images.raw_BCHW.shape == (2 * each, 3, 5, 11)
        assert images.labels_B.tolist() == [0] * each + [1] * each
        assert levels(loaded) == [0] * each + [255] * each
        (gray,) = load(tmp_path, split, n_channels=1).images.values()
        assert gray.raw_BCHW.shape == (2 * each, 1, 5, 11)


def test_an_empty_split_has_no_images(pictures: Path) -> None:
    for path in list(pictures.glob("dog/*.png"))[1:]:
        path.unlink()
    for path in [*pictures.glob("cat/*.png")][1:]:
        path.unlink()
    assert load(pictures, "validation").images["validation"].raw_BCHW.shape == (0, 3, 5, 11)


def test_corrupt_pictures_are_named_and_skipped(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load(pictures, "train")
    files = scan(pictures).paths("train")
    files[3].write_text("no picture")
    files[11].write_bytes(files[11].read_bytes()[:50])
    with caplog.at_level(logging.WARNING, "vitrail"):
        loaded = load(pictures, "train")
    assert levels(loaded) == [v for i, v in enumerate(levels(before)) if i not in (3, 11)]
    assert f"{files[3]}: not a picture that can be read" in caplog.text
    assert f"{files[11]}: " in caplog.text
    assert "2 of 26 train pictures left out" in caplog.text
    assert loaded.manifest is not None
    assert loaded.manifest.paths("train") == [f for i, f in enumerate(files) if i not in (3, 11)]
    assert [pictures / name for name in loaded.manifest.left_out["broken"]] == [files[3], files[11]]


def test_a_class_without_readable_pictures_is_refused(pictures: Path) -> None:
    for path in pictures.glob("cat/*.png"):
        path.write_text("no picture")
    with pytest.raises(DataError, match="none of the training pictures of class 'cat' can be"):
        load(pictures, "train")
    for path in pictures.glob("*/*.png"):
        path.write_text("no picture")
    with pytest.raises(DataError, match="no picture of the test split can be decoded"):
        load(pictures, "test")
