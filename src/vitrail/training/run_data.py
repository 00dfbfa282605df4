"""The data of a run: the files it was started with, and its splits in memory."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.config.settings import Config, Split
from vitrail.data.datasets import Loaded, load_data
from vitrail.data.images import ImageSet
from vitrail.data.manifest import (
    FILE,
    Manifest,
    choose_manifest,
    count_added,
    load_manifest,
    scan,
    verify,
)
from vitrail.runtime import distributed

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier


def load_split(classifier: "Classifier", split: Split, **changes: Any) -> ImageSet:
    """Load a split of the data that a model was trained on, or of other data.

    Args:
        classifier: the model. If it comes from a run, the run's manifest determines the splits.
        split: the split. All of a folder other than the training data is its test split.
        changes: data settings that differ from those of the training, such as ``data_path``.

    Raises:
        DataError: data are missing, or changed since the training.
    """
    config = classifier.config
    data = dataclasses.replace(config.data, **changes)
    manifest = None
    if data.dataset == "folder":
        known = _manifest_of(Path(classifier.source))
        manifest = choose_manifest(data, config.data, known, split, classifier.classes)
    return _load(dataclasses.replace(config, data=data), manifest, split).images[split]


def load_on_all_ranks(config: Config, manifest: Manifest | None, *splits: Split) -> Loaded:
    """Load splits on every rank; where a download may be needed, on one rank per machine first."""
    downloads = config.data.dataset.startswith("cifar")
    on_ranks = distributed.first_on_machine if downloads else distributed.each
    return on_ranks(_load, config, manifest, *splits)


def list_files(config: Config, manifest: Manifest | None) -> Manifest | None:
    """Return the files of a new run, with fingerprints; None if its data set is not a folder."""
    if config.data.dataset != "folder":
        return None
    listed = manifest or scan(config.data.data_path, config.data.validation_images)
    return listed.with_fingerprints(config.data.num_workers)


def restore_files(config: Config, folder: Path) -> tuple[Manifest | None, int]:
    """Return the files that a run started with, after verifying them, and how many were added.

    Raises:
        DataError: a file was removed or changed.
    """
    if config.data.dataset != "folder":
        return None, 0
    if not (folder / FILE).is_file():  # the run was stopped before its settings were written
        return list_files(config, None), 0
    manifest = dataclasses.replace(load_manifest(folder), root=config.data.data_path)
    verify(manifest, manifest.files, config.data.num_workers)
    return manifest, count_added(manifest)


def _load(config: Config, manifest: Manifest | None, *splits: Split) -> Loaded:
    """Load splits in the size and channels of the model."""
    return load_data(
        config.data,
        splits,
        image_hw=config.model.image_hw,
        n_channels=config.model.n_channels,
        manifest=manifest,
    )


def _manifest_of(source: Path) -> Manifest | None:
    """Return the manifest of the run that a run folder or a checkpoint folder belongs to."""
    for folder in (source, source.parent.parent):
        if (folder / FILE).is_file():
            return load_manifest(folder)
    return None
