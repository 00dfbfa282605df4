"""How folders of pictures are searched and organized: classes, or splits in usual spellings."""

from pathlib import Path

import pytest

from vitrail.data.formats import walk_files
from vitrail.data.manifest import find_layout
from vitrail.errors import DataError


def make(root: Path, *names: str) -> Path:
    """Empty files; only names with a picture's ending count as pictures here."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def trees(root: Path) -> dict[str, str]:
    found = find_layout(root)
    return {split: tree.relative_to(root).as_posix() for split, tree in found.trees.items()}


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("Training", "Validation", "Testing"),
        ("training_set", "validation_set", "test_set"),
        ("trainset", "valset", "testset"),
        ("train_data", "val_data", "test_data"),
        ("seg_train", "seg_val", "seg_test"),
        ("train2017", "val2017", "test2017"),
        ("train-images", "dev-images", "test-images"),
    ],
)
def test_split_folders_are_recognized_by_their_usual_names(
    tmp_path: Path, train: str, validation: str, test: str
) -> None:
    for name in (train, validation, test):
        make(tmp_path, f"{name}/cat/1.png", f"{name}/dog/1.png")
    assert trees(tmp_path) == {"train": train, "validation": validation, "test": test}
    assert not find_layout(tmp_path).one_tree


def test_a_repeated_folder_of_an_archive_is_entered_once(tmp_path: Path) -> None:
    for split in ("training_set", "test_set"):
        make(tmp_path, f"{split}/{split}/cat/1.png", f"{split}/{split}/dog/1.png")
    assert trees(tmp_path) == {"train": "training_set/training_set", "test": "test_set/test_set"}
    root = make(tmp_path / "mri", "mri/train/cat/1.png", "mri/train/dog/1.png")
    assert trees(root) == {"train": "mri/train"}


def test_classes_in_one_tree(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.png", "dog/deeper/1.png", "test strip/1.png", "notes.txt")
    assert trees(tmp_path) == {"train": "."}
    assert find_layout(tmp_path).one_tree


def test_a_class_may_be_named_as_a_split(tmp_path: Path) -> None:
    make(tmp_path, "train/1.png", "tram/1.png", "freight train/1.png", "passenger train/2.png")
    assert trees(tmp_path) == {"train": "."}


def test_other_folders_next_to_splits_are_reported(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.png", "test/cat/1.png", "extra/cat/1.png")
    assert [path.name for path in find_layout(tmp_path).unused] == ["extra"]
    make(tmp_path, "old_train/cat/1.png", "test_2/dog/1.png")
    assert trees(tmp_path) == {"train": "train", "test": "test"}
    assert [path.name for path in find_layout(tmp_path).unused] == ["extra", "old_train", "test_2"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Training/1.png", "Testing/2.png"], "Testing/ looks like a test split, but has no"),
        (["train/a/1.png", "train/b/1.png", "val/1.png"], "val/ looks like a validation split"),
        (["train/a/1.png", "Training/a/1.png", "test/a/1.png"], "are both a train split"),
        (["train/steam/1.png", "car/1.png"], "train/ looks like a split, but car/ next to it"),
    ],
)
def test_what_looks_like_splits_is_never_read_as_classes(
    tmp_path: Path, names: list[str], message: str
) -> None:
    make(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find_layout(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such folder; give --data_path"):
        find_layout(tmp_path / "none")


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in walk_files(root)]


def test_hidden_files_and_folders_are_skipped_at_every_depth(tmp_path: Path) -> None:
    make(tmp_path, "b/2", "b/1", "a/deep/3")
    make(tmp_path, ".git/x", "a/.ipynb_checkpoints/x", "b/.DS_Store")
    make(tmp_path, "__MACOSX/b/x")
    assert names(tmp_path) == ["a/deep/3", "b/1", "b/2"]


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    make(root, "a/1")
    make(elsewhere, "2", "3")
    (root / "a/batch").symlink_to(elsewhere)
    (root / "twice").symlink_to(elsewhere)
    (root / "one").symlink_to(elsewhere / "2")
    (root / "broken").symlink_to(tmp_path / "nowhere")
    assert names(root) == ["a/1", "a/batch/2", "a/batch/3", "one", "twice/2", "twice/3"]


def test_a_link_to_a_folder_that_contains_it_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a/1")
    (tmp_path / "a/again").symlink_to(tmp_path)
    with pytest.raises(DataError, match="a/again: this link leads to a folder that contains it"):
        names(tmp_path)
