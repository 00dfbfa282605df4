"""Class-named folders of pictures."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrine.data.folder import load_folder
from vitrine.data.images import ImageSet
from vitrine.errors import DataError


def draw(path: Path, level: int, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Path:
    """A picture of one gray."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).convert(mode).save(path)
    return path


def load(data_path: Path, which: str, workers: int = 3) -> ImageSet:
    return load_folder(
        data_path,
        which,  # type: ignore[arg-type]
        size_hw=(5, 11),
        fit="squash",
        num_workers=workers,
    )


@pytest.fixture
def one_tree(tmp_path: Path) -> Path:
    """Classes of 23, 7, 2 and 1 pictures, each of its own gray."""
    level = 0
    for name, count in (("dog", 23), ("cat", 7), ("ant", 2), ("bee", 1)):
        for number in range(count):
            level += 5
            draw(tmp_path / name / f"{number}.png", level)
    return tmp_path


def levels(images: ImageSet) -> list[int]:
    """The grays of the pictures, which tell them apart."""
    return images.raw_BCHW[:, 0, 0, 0].tolist()


def test_reads_two_trees_of_any_size_and_mode(tmp_path: Path) -> None:
    for which, modes in (("train", ("RGB", "L", "P", "RGBA")), ("test", ("1", "LA"))):
        for number, mode in enumerate(modes):
            size = (3 + 4 * number, 17 - 5 * number)
            draw(tmp_path / which / "white" / "deeper" / f"{number}.png", 255, mode, size)
            draw(tmp_path / which / "black" / f"{number}.PNG", 0, mode, size)
    draw(tmp_path / "val" / "gray" / "0.png", 99)
    draw(tmp_path / "train" / ".thumbnails" / "0.png", 99)
    draw(tmp_path / "train" / "white" / "._0.png", 99)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "notes.txt").touch()
    for which, each in (("train", 4), ("test", 2)):
        images = load(tmp_path, which)
        assert images.classes == ("black", "white")
        assert images.raw_BCHW.shape == (2 * each, 3, 5, 11)
        assert images.labels_B.tolist() == [0] * each + [1] * each
        assert levels(images) == [0] * each + [255] * each


def test_cuts_one_tree_by_class_without_overlap(one_tree: Path) -> None:
    train, test = load(one_tree, "train"), load(one_tree, "test")
    assert train.classes == test.classes == ("ant", "bee", "cat", "dog")
    assert train.labels_B.bincount().tolist() == [1, 1, 6, 21]
    assert test.labels_B.bincount().tolist() == [1, 0, 1, 2]
    assert sorted(levels(train) + levels(test)) == list(range(5, 170, 5))


def test_the_cut_hangs_on_names_only(
    one_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in sorted(one_tree.rglob("*.png"), reverse=True):
        copy = elsewhere / path.relative_to(one_tree)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert levels(load(elsewhere, "test", workers=1)) == levels(load(one_tree, "test"))
    assert levels(load(one_tree, "test")) == [155, 120, 30, 40]


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    for name in ("train", "tram"):
        for number in range(3):
            draw(tmp_path / name / f"{number}.png", number)
    assert load(tmp_path, "train").classes == ("train", "tram")


def test_names_what_it_leaves_out(one_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = levels(load(one_tree, "train"))
    kept = [path for path in sorted(one_tree.rglob("*.png")) if is_kept(path, before)]
    kept[3].write_text("no picture")
    kept[11].write_bytes(kept[11].read_bytes()[:50])
    with caplog.at_level(logging.WARNING, "vitrine"):
        images = load(one_tree, "train")
    assert len(images) == len(before) - 2
    assert caplog.messages[0] == f"left out: {kept[3]}: not a picture that can be read"
    assert caplog.messages[1].startswith(f"left out: {kept[11]}: cannot be read: ")
    assert caplog.messages[2:] == ["2 of 29 pictures left out"]


def is_kept(path: Path, kept: list[int]) -> bool:
    return int(np.asarray(Image.open(path))[0, 0, 0]) in kept


def test_refuses_folders_that_teach_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: no such folder; give --data_path"):
        load(tmp_path / "none", "train")
    with pytest.raises(DataError, match=r": 0 folders with pictures in them, but"):
        load(tmp_path, "train")
    only = draw(tmp_path / "only" / "0.png", 3)
    with pytest.raises(DataError, match=r": 1 folders with pictures in them, but"):
        load(tmp_path, "train")
    only.write_text("no picture")
    draw(tmp_path / "second" / "0.png", 3).write_text("no picture")
    with pytest.raises(DataError, match=r"no picture of the train split can be read$"):
        load(tmp_path, "train")


def test_refuses_a_test_tree_that_does_not_match(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        draw(tmp_path / "train" / name / "0.png", 3)
    assert len(load(tmp_path, "train")) == 2
    with pytest.raises(DataError, match=r"test: no such folder, but train/ is there"):
        load(tmp_path, "test")
    draw(tmp_path / "test" / "cow" / "0.png", 3)
    with pytest.raises(DataError, match=r"test: class 'cow' is not among the training classes$"):
        load(tmp_path, "test")
