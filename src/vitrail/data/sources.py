"""Which kind of dataset a path is; open datasets of arrays by name. No torch is imported."""

from pathlib import Path

from vitrail.config.settings import ARRAYS, DataConfig, Dataset
from vitrail.data.arrays import ArraySource
from vitrail.data.hf import SAVED, is_on_hub, open_hf
from vitrail.data.idx import has_idx, open_idx
from vitrail.data.npz import open_npz
from vitrail.errors import DataError

SUFFIXES: dict[str, Dataset] = {".npz": "npz", ".parquet": "hf"}


def open_source(config: DataConfig) -> ArraySource:
    """Return the dataset that the settings name.

    Raises:
        DataError: it is not of the kind that the settings name.
    """
    return {"idx": open_idx, "npz": open_npz, "hf": open_hf}[config.dataset](config.data_path)


def is_gray(config: DataConfig) -> bool:
    """Return whether the dataset consists of arrays of gray pictures only."""
    return config.dataset in ARRAYS and open_source(config).gray


def recognize(path: Path) -> Dataset:
    """Return which kind of dataset a path is, by its name and the names of the files in it.

    Raises:
        DataError: there is no such path, or it is not a dataset.
    """
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    folder = path if path.is_dir() else path.parent
    if has_idx(folder) or has_idx(folder / "raw"):
        return "idx"
    saved = any((path / name).is_file() for name in SAVED)
    if is_on_hub(path) or saved or any(path.glob("*.parquet")):
        return "hf"
    if path.is_dir():
        return "folder"
    raise DataError(f"{path}: no such file or folder of data: give an .npz or .parquet file, a "
                    "folder of IDX files or of class folders, or hf:OWNER/NAME")  # fmt: skip
