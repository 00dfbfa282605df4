"""Which pictures of a folder a run uses, in which split, and what happens when they change."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vitrail.config.settings import DataConfig
from vitrail.data.manifest import (
    SPLITS,
    Manifest,
    choose_manifest,
    count_added,
    count_files,
    load_manifest,
    scan,
    scan_whole,
    summary,
    verify,
)
from vitrail.errors import CheckpointError, ConfigError, DataError


def draw(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2), level).save(path, "png")
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Classes of 40, 20, 2 and 1 pictures."""
    root = tmp_path / "pictures"
    for label, (name, count) in enumerate((("ant", 40), ("bee", 20), ("cat", 2), ("dog", 1))):
        for number in range(count):
            draw(root / name / f"{number:02}.png", 50 * label + number)
    return root


def counts(manifest: Manifest) -> dict[str, list[int]]:
    return dict(count_files(manifest))


def names(manifest: Manifest, split: str) -> set[str]:
    return {file.path for file in manifest.files.get(split, ())}  # type: ignore[call-overload]


def test_one_tree_is_split_by_class_without_overlap(pictures: Path) -> None:
    manifest = scan(pictures)
    assert counts(manifest) == {"ant": [33, 3, 4], "bee": [16, 2, 2], "cat": [1, 0, 1],
                                "dog": [1, 0, 0]}  # fmt: skip
    every = [name for split in SPLITS for name in names(manifest, split)]
    assert len(every) == len(set(every)) == 63


def test_the_split_depends_on_names_only(pictures: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in sorted(pictures.rglob("*.png"), reverse=True):
        draw(copy / path.relative_to(pictures), 7)
    assert scan(copy).files == scan(pictures).files


def test_validation_images_are_stratified_and_optional(pictures: Path) -> None:
    assert counts(scan(pictures, 12))["ant"][1] == 8
    assert sum(row[1] for row in counts(scan(pictures, 12)).values()) == 12
    assert names(scan(pictures, 0), "validation") == set()
    with pytest.raises(ConfigError, match="validation_images is 56, but there are 56 training"):
        scan(pictures, 56)


def test_a_subset_is_stratified(pictures: Path) -> None:
    limited = scan(pictures).limited(DataConfig(num_train_images=25, num_test_images=3))
    assert [row[0] for row in counts(limited).values()] == [16, 8, 1, 0]
    assert [row[2] for row in counts(limited).values()] == [2, 1, 0, 0]
    assert len(limited.left_out["not in the requested subset"]) == 26 + 4


def test_split_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for split, count in (("Training", 6), ("valid", 3), ("Testing", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                draw(tmp_path / split / name / f"{number}.png")
    manifest = scan(tmp_path)
    assert counts(manifest) == {"cat": [6, 3, 2], "dog": [6, 3, 2]}
    assert counts(manifest.limited(DataConfig(validation_images=2)))["dog"] == [6, 1, 2]
    assert manifest.paths("test")[0] == tmp_path / "Testing/cat/0.png"
    shutil.rmtree(tmp_path / "Testing")
    shutil.rmtree(tmp_path / "valid")
    assert counts(scan(tmp_path)) == {"cat": [5, 1, 0], "dog": [6, 0, 0]}


def test_skipped_files_are_counted_and_named(pictures: Path) -> None:
    (pictures / "ant/notes.txt").write_text("")
    (pictures / "bee/film.mp4").write_text("")
    (pictures / "bee/other.MP4").write_text("")
    draw(pictures / "loose.png")
    draw(pictures / ".hidden/1.png")
    draw(pictures / "ant/.ipynb_checkpoints/1.png")
    manifest = scan(pictures)
    assert sum(map(sum, counts(manifest).values())) == 63
    left_out = {name for names in manifest.left_out.values() for name in names}
    assert left_out == {"ant/notes.txt", "bee/film.mp4", "bee/other.MP4", "loose.png"}
    assert "2 .mp4" in summary(manifest)
    assert "1 not in a class folder" in summary(manifest)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (["train/a/1.png"], "at least 2 class folders with pictures, found 1"),
        (["a/1.txt", "b/1.png"], "at least 2 class folders with pictures, found 1"),
        (["test/a/1.png", "val/a/1.png"], "found .*val/.*, but no train/ next to it"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "class 'c' is not among the training"),
    ],
)
def test_unusable_folders_are_refused(tmp_path: Path, make: list[str], message: str) -> None:
    for name in make:
        path = draw(tmp_path / name)
        if path.suffix == ".txt":
            path.write_text("no picture")
    with pytest.raises(DataError, match=message):
        scan(tmp_path)


def test_a_manifest_round_trips_through_its_file(pictures: Path, tmp_path: Path) -> None:
    draw(pictures / "ant" / os.fsdecode(b"\xff odd \xe9.png"))
    (pictures / "ant/notes.txt").write_text("")
    manifest = scan(pictures).with_fingerprints(2)
    manifest.save(tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert all(file.fingerprint for split in SPLITS for file in manifest.files[split])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}",
     '{"root": "x", "classes": ["a"], "files": {"train": [["x", 1, ""]]}, "left_out": {}}',
     '{"root": "x", "classes": ["a"], "files": {"train": [["x", 0, "", 7]]}, "left_out": {}}'],
)  # fmt: skip
def test_a_corrupt_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest.json: corrupt"):
        load_manifest(tmp_path)


def remove(root: Path) -> None:
    (root / "ant/05.png").unlink()


def exchange(root: Path) -> None:
    draw(root / "ant/05.png", 99)


def rename(root: Path) -> None:
    (root / "ant").rename(root / "zant")


@pytest.mark.parametrize(
    ("change", "message"),
    [(remove, r"1 missing \(ant/05.png\)"), (exchange, r"1 replaced \(ant/05.png\)"),
     (rename, r"40 missing \(ant/\d\d.png, ant/\d\d.png, ant/\d\d.png, \.\.\.\)")],
)  # fmt: skip
def test_changed_files_are_refused_with_what_changed(
    pictures: Path, change: Callable[[Path], None], message: str
) -> None:
    manifest = scan(pictures).with_fingerprints(1)
    verify(manifest, SPLITS, 3)
    change(pictures)
    with pytest.raises(DataError, match=message):
        verify(manifest, SPLITS, 3)


def test_added_files_change_no_split_and_are_counted(pictures: Path) -> None:
    manifest = scan(pictures).with_fingerprints(1)
    for number in range(30):
        draw(pictures / "ant" / f"new-{number}.png")
    draw(pictures / "elk/1.png")
    verify(manifest, SPLITS, 1)
    assert count_added(manifest) == 31


def trained_on(path: Path) -> DataConfig:
    return DataConfig(dataset="folder", data_path=path)


def test_the_training_folder_and_its_copy_use_the_manifest(pictures: Path, tmp_path: Path) -> None:
    known = scan(pictures).with_fingerprints(1)
    shutil.copytree(pictures, tmp_path / "copy")
    for number in range(50):
        draw(pictures / "bee" / f"new-{number}.png")
        draw(tmp_path / "copy/bee" / f"new-{number}.png")
    trained = trained_on(pictures)
    for place in (pictures, tmp_path / "copy"):
        chosen, same = choose_manifest(trained_on(place), trained, known, "test", known.classes)
        assert same
        assert chosen.files == known.files
        assert chosen.root == place
    remove(pictures)
    for split in ("train", "test", "validation"):
        if "ant/05.png" in names(known, split):
            with pytest.raises(DataError, match=r"1 missing \(ant/05.png\)"):
                choose_manifest(trained, trained, known, split, known.classes)  # type: ignore[arg-type]


def test_all_of_another_folder_is_evaluated(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = scan(pictures).with_fingerprints(1)
    for number in range(9):
        draw(tmp_path / "other/bee" / f"{number}.png", 200 + number)
    other = trained_on(tmp_path / "other")
    chosen, same = choose_manifest(other, trained_on(pictures), known, "test", known.classes)
    assert not same
    assert counts(chosen) == {"ant": [0, 0, 0], "bee": [0, 0, 9], "cat": [0, 0, 0],
                             "dog": [0, 0, 0]}  # fmt: skip
    assert caplog.messages == []
    learned = sorted(known.paths("train"))[0]
    shutil.copy(learned, tmp_path / "other/bee/again.png")
    with caplog.at_level(logging.WARNING, "vitrail"):
        choose_manifest(other, trained_on(pictures), known, "test", known.classes)
    assert "the model was trained on 1 of these 10 pictures" in caplog.text


def test_another_folder_keeps_its_splits_and_must_know_the_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        draw(tmp_path / split / "bee/1.png")
    assert counts(scan_whole(tmp_path, ["ant", "bee"]))["bee"] == [1, 1, 0]
    with pytest.raises(DataError, match=r"class 'bee' is not among the training classes \(ant\)"):
        scan_whole(tmp_path, ["ant"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folder with pictures"):
        scan_whole(tmp_path / "empty", ["ant"])


def test_without_a_manifest_only_the_training_folder_is_split_again(
    pictures: Path, tmp_path: Path
) -> None:
    trained = trained_on(pictures)
    classes = scan(pictures).classes
    assert choose_manifest(trained, trained, None, "test", classes) == (scan(pictures), True)
    shutil.copytree(pictures, tmp_path / "copy")
    copy = trained_on(tmp_path / "copy")
    chosen, same = choose_manifest(copy, trained, None, "test", classes)
    assert not same
    assert len(chosen.files["test"]) == 63
