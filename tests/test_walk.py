"""Which files a search of a folder finds."""

from pathlib import Path

import pytest

from vitrail.data.walk import walk_files
from vitrail.errors import DataError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in walk_files(root)]


def test_hidden_files_and_folders_are_skipped_at_every_depth(tmp_path: Path) -> None:
    touch(tmp_path / "b/2", tmp_path / "b/1", tmp_path / "a/deep/3")
    touch(tmp_path / ".git/x", tmp_path / "a/.ipynb_checkpoints/x", tmp_path / "b/.DS_Store")
    touch(tmp_path / "__MACOSX/b/x")
    assert names(tmp_path) == ["a/deep/3", "b/1", "b/2"]


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root / "a/1", elsewhere / "2", elsewhere / "3")
    (root / "a/batch").symlink_to(elsewhere)
    (root / "twice").symlink_to(elsewhere)
    (root / "one").symlink_to(elsewhere / "2")
    (root / "broken").symlink_to(tmp_path / "nowhere")
    assert names(root) == ["a/1", "a/batch/2", "a/batch/3", "one", "twice/2", "twice/3"]


def test_a_link_that_leads_back_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a/1")
    (tmp_path / "a/again").symlink_to(tmp_path)
    with pytest.raises(DataError, match="a/again: this link leads back"):
        names(tmp_path)
