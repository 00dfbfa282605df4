"""IDX and .npz: the same pictures as a folder of files, and an error for what they are not."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.config.files import from_json
from vitrail.config.settings import Config, DataConfig, Dataset
from vitrail.data.datasets import load_data
from vitrail.data.images import ImageSet
from vitrail.data.pictures import read_picture
from vitrail.data.sources import open_source, recognize
from vitrail.errors import DataError, PictureError
from vitrail.training.run import Run

RNG = np.random.default_rng(3)
TRAIN, TEST = (RNG.integers(0, 256, (n, 9, 9), np.uint8) for n in (12, 4))
LABELS, TEST_LABELS = np.arange(12) % 2, np.arange(4) % 2


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of bytes in the IDX format."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, prefix: str = "", *, images: np.ndarray = TRAIN, base: int = 0) -> Path:
    """A dataset in IDX files: the training part packed, the test part not."""
    folder.mkdir(exist_ok=True)
    for split, pictures, labels in (("train", images, LABELS), ("t10k", TEST, TEST_LABELS)):
        for kind, array in (("images-idx3", pictures), ("labels-idx1", labels + base)):
            path = folder / f"{prefix}{split}-{kind}-ubyte"
            path.write_bytes(idx_bytes(array))
            if split == "train":
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    return folder


def write_npz(path: Path, **arrays: object) -> Path:
    """An .npz in MedMNIST's layout, with some arrays replaced."""
    column = LABELS[:, None].astype(np.uint8)
    given = {"train_images": TRAIN, "train_labels": column, "test_images": TEST,
             "test_labels": TEST_LABELS[:, None], **arrays}  # fmt: skip
    np.savez(path, **{name: array for name, array in given.items() if array is not None})
    return path


def write_folder(folder: Path) -> Path:
    """The same pictures as files, whose order is that of the arrays."""
    for split, images, labels in (("train", TRAIN, LABELS), ("test", TEST, TEST_LABELS)):
        for number, (picture, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / str(label) / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return folder


def load(
    dataset: Dataset, path: Path, split: str = "train", *, size: int = 9, n_channels: int = 1,
    **settings: object,
) -> ImageSet:  # fmt: skip
    """A split at a size."""
    config = DataConfig(dataset=dataset, data_path=path, **{"validation_images": 0, **settings})
    return load_data(
        config, [split], image_hw=(size, size), n_channels=n_channels
    ).images[split]  # fmt: skip


WRITERS: dict[Dataset, Callable[[Path], Path]] = {
    "idx": write_idx,
    "npz": lambda path: write_npz(path.with_suffix(".npz")),
}


@pytest.mark.parametrize("dataset", WRITERS)
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("size", "n_channels", "fit"), [(9, 1, "crop"), (6, 1, "pad"),
                                                         (6, 3, "crop")])  # fmt: skip
def test_pixels_are_those_of_a_folder(
    dataset: Dataset, split: str, size: int, n_channels: int, fit: str, tmp_path: Path
) -> None:
    path = WRITERS[dataset](tmp_path / "arrays")
    given = {"size": size, "n_channels": n_channels, "fit": fit}
    images = load(dataset, path, split, **given)
    files = load("folder", write_folder(tmp_path / "files"), split, **given)
    order_B = images.labels_B.argsort(stable=True)  # a folder is sorted by class
    assert torch.equal(images.raw_BCHW[order_B], files.raw_BCHW)
    assert torch.equal(images.labels_B[order_B], files.labels_B)
    assert images.classes == files.classes == ("0", "1")
    assert recognize(path) == dataset
    assert recognize(tmp_path / "files") == "folder"
    assert recognize(path.with_name("x.parquet")) == "hf"


def test_emnist_is_transposed_and_named_by_its_mapping(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "gzip", "emnist-letters-", base=1)
    (folder / "emnist-letters-mapping.txt").write_text("2 66 98\n1 65 97\n")
    images = load("idx", folder)
    assert images.classes == ("A", "B")
    assert images.labels_B.tolist() == LABELS.tolist()
    assert np.array_equal(images.raw_BCHW[:, 0], TRAIN.transpose(0, 2, 1))


def test_one_of_several_idx_data_sets_is_chosen_by_name(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "many", "emnist-digits-")
    write_idx(folder, images=TRAIN[::-1])
    with pytest.raises(DataError, match=r"give --data_path one of .*many/emnist-digits"):
        load("idx", folder)
    images = load("idx", folder / "emnist-digits")
    assert np.array_equal(images.raw_BCHW[:, 0], TRAIN.transpose(0, 2, 1))


def test_class_names_of_the_sources(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "fashion")
    (folder / "classes.txt").write_text("shirt\nAnkle boot\n")
    assert load("idx", folder).classes == ("shirt", "Ankle boot")
    named = write_npz(tmp_path / "named.npz", classes=np.array(["cat", "dog"]))
    assert load("npz", named).classes == ("cat", "dog")
    labels = write_npz(tmp_path / "l.npz", train_labels=np.where(LABELS, "yes", "no"),
                       test_labels=np.where(TEST_LABELS, "yes", "no"))  # fmt: skip
    assert load("npz", labels).classes == ("no", "yes")
    assert load("npz", labels, "test").labels_B.tolist() == TEST_LABELS.tolist()


def test_an_unsplit_source_is_cut_once_and_for_all(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (100, 4, 4), np.uint8)
    images[:, 0, 0] = np.arange(100)
    path = tmp_path / "all.npz"
    np.savez(path, X=images, y=np.arange(100) % 2)

    def marks(split: str, **settings: object) -> set[int]:
        loaded = load("npz", path, split, size=4, **{"validation_images": None, **settings})
        return set(loaded.raw_BCHW[:, 0, 0, 0].tolist())

    parts = [marks(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [81, 9, 10]
    assert len(set.union(*parts)) == 100
    assert marks("test", num_train_images=20) == parts[2]
    assert marks("train", num_train_images=20) < parts[0]


def test_numbers_of_any_kind_become_bytes(tmp_path: Path) -> None:
    sixteenths = write_npz(tmp_path / "a.npz", train_images=TRAIN / 255 * 16)
    assert np.array_equal(load("npz", sixteenths).raw_BCHW[:, 0], TRAIN)
    config = DataConfig(dataset="npz", data_path=sixteenths)
    loaded = load_data(config, ["train"], image_hw=(9, 9), n_channels=1)
    assert loaded.pixel_range is not None
    assert loaded.pixel_range[1] == pytest.approx(16, rel=0.01)
    unit = write_npz(tmp_path / "b.npz", train_images=(TRAIN / 255).astype(np.float32))
    assert np.array_equal(load("npz", unit).raw_BCHW[:, 0], TRAIN)
    channels_first = write_npz(tmp_path / "c.npz", train_images=np.stack([TRAIN] * 3, 1))
    assert np.array_equal(load("npz", channels_first, n_channels=3).raw_BCHW[:, 1], TRAIN)
    clear = np.dstack([TRAIN[0]] * 3 + [np.zeros_like(TRAIN[0])])
    rgba = write_npz(tmp_path / "d.npz", train_images=np.stack([clear] * 12))
    assert load("npz", rgba, n_channels=3).raw_BCHW.unique().tolist() == [255]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_images": None}, "train_images is missing"),
        ({"train_images": TRAIN[:5]}, "5 pictures, but 12 labels"),
        ({"train_images": TRAIN.reshape(12, 81)}, "is that of rows of numbers, not pictures"),
        ({"train_images": np.zeros((12, 9, 9, 9), np.uint8)}, r"the shape \(12, 9, 9, 9\)"),
        ({"train_images": np.zeros((12, 3, 9, 3), np.uint8)}, "which is ambiguous"),
        ({"train_labels": np.zeros((12, 14))}, "14 labels per picture"),
        ({"train_labels": LABELS + 0.5}, "labels of type float64"),
        ({"train_labels": np.zeros(12)}, "at least 2 classes, found 0"),
        ({"test_labels": TEST_LABELS + 5}, "label 5 of the test split is not among the 2 classes"),
        ({"classes": np.array(["only one"])}, "label 1 of the train split"),
        ({"train_images": np.full((12, 9, 9), None)}, "pictures of type object"),
        ({"train_labels": np.array([None] * 12)}, "train_labels cannot be read"),
        ({"X": TRAIN, "y": LABELS}, "a second train split"),
    ],
)
def test_npz_files_that_are_not_what_they_claim(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    path = write_npz(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load("npz", path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "x.npz"
    with pytest.raises(DataError, match="No such file"):
        load("npz", other)
    other.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(DataError, match=r"not an \.npz file"):
        load("npz", other)
    np.savez(other, a=TRAIN)
    with pytest.raises(DataError, match=r"no arrays train_images .*\(it has a\)"):
        load("npz", other)
    with pytest.raises(DataError, match="no such file or folder"):
        recognize(tmp_path / "nothing")
    path = write_npz(tmp_path / "cut.npz")
    content = bytearray(path.read_bytes())
    at = content.index(TRAIN.tobytes()[:8])
    content[at] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match="train_images cannot be read"):
        load("npz", path)
    content = bytearray(write_npz(path).read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(header) + flags] |= 1  # encrypted
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train_images cannot be read: .*password"):
        load("npz", path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda old: old[:-20], "cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda old: b"<!DOCTYPE html>", "not an IDX file"),
        ("train-images-idx3-ubyte.gz", lambda old: gzip.compress(gzip.decompress(old)[:-1]),
         "971 bytes of data, but its header announces 972"),
        ("train-images-idx3-ubyte.gz", lambda old: gzip.compress(idx_bytes(LABELS)),
         "an array of 1 dimensions, not 3"),
        ("train-labels-idx1-ubyte.gz", lambda old: gzip.compress(idx_bytes(LABELS[:5])),
         "12 pictures, but 5 labels"),
        ("train-labels-idx1-ubyte.gz", None, "the matching file of labels is missing"),
        ("train-labels-idx1-ubyte.gz", lambda old: b"\0\0\x08\x01", "truncated"),
    ],
)  # fmt: skip
def test_idx_files_that_are_not_what_they_claim(
    file: str, change: Callable[[bytes], bytes] | None, message: str, tmp_path: Path
) -> None:
    folder = write_idx(tmp_path / "idx")
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(DataError, match=message):
        load("idx", folder)
    with pytest.raises(DataError, match="no IDX files here"):
        load("idx", tmp_path / "nothing")


@pytest.mark.usefixtures("rough_plots")
def test_a_gray_medmnist_file_trains_and_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_npz(tmp_path / "bloodmnist.npz", val_images=TEST, val_labels=TEST_LABELS[:, None])
    model = {"patch_size": 8, "embed_dim": 16, "n_layers": 1, "n_attention_heads": 2}
    flags = [word for name, value in model.items() for word in (f"--{name}", str(value))]
    words = ["train", "--dataset", "npz", "--data_path", str(path), "--epochs", "1", *flags]
    assert main(words) == 0
    assert "2 classes, 20 gray pictures" in capsys.readouterr().err
    assert '"n_channels": 1' in (tmp_path / "output/quick/config.json").read_text()
    assert main(["test", "output/quick", "--json"]) == 0
    assert '"images": 4' in capsys.readouterr().out


def test_a_source_without_a_test_split_has_no_test_score(tiny_run: Config, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", test_images=None, test_labels=None, val_images=TEST,
                     val_labels=TEST_LABELS)  # fmt: skip
    assert set(open_source(DataConfig(dataset="npz", data_path=path)).parts) == {
        "train", "validation",
    }  # fmt: skip
    with pytest.raises(DataError, match="there is no test split"):
        load("npz", path, "test")
    config = from_json({"data": {"dataset": "npz", "data_path": str(path)}}, tiny_run)
    run = Run.start(config, tmp_path / "run")
    for _ in run.train():
        pass
    assert run.finish()["test"] is None


def test_arrays_are_predicted_in_the_units_of_the_training() -> None:
    sixteenths = TRAIN[0] / 255 * 16
    raw_HWC = read_picture(sixteenths, pixel_range=(0.0, 16.0))
    assert np.array_equal(raw_HWC[..., 0], TRAIN[0])
    whole = read_picture(np.arange(17).reshape(1, 17), pixel_range=(0.0, 16.0))
    assert whole[0, [0, 8, 16], 0].tolist() == [0, 128, 255]
    with pytest.raises(PictureError, match="from 0"):
        read_picture(sixteenths)
