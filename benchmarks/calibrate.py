"""Fit the calibration of a bundled model on its validation images; its weights do not change.

python benchmarks/calibrate.py NAME [DATA_FOLDER]
"""

import dataclasses
import sys
from pathlib import Path

import torch

import vitrail
from vitrail.evaluation.calibration import fit
from vitrail.evaluation.metrics import Features, measure, predict_logits
from vitrail.training.run_folder import load_split
from vitrail.weights import bundled
from vitrail.weights.checkpoint import load_weights_file, save_weights_file


def main() -> None:
    calibrate(sys.argv[1], Path(*sys.argv[2:3] or ["data"]))


def calibrate(name: str, folder: Path) -> None:
    """Fit the calibration of a bundled model to the validation images of the data in a folder."""
    classifier = vitrail.load(name)
    images = load_split(classifier, "validation", data_path=folder)
    features_BD = predict_logits(
        Features(classifier.model), images,
        mean=classifier.mean, std=classifier.std, device=classifier.device,
    )  # fmt: skip
    with torch.no_grad():
        logits_BY = classifier.model.head(features_BD.to(classifier.device)).cpu()
    smoothing = classifier.config.training.label_smoothing
    calibration = fit(logits_BY, images.labels_B, features_BD, smoothing=smoothing)
    path = bundled.weights_path(name)
    info, weights = load_weights_file(path)
    save_weights_file(path, dataclasses.replace(info, calibration=calibration), weights)
    metrics = measure(logits_BY, images.labels_B, classes=images.classes, calibration=calibration)
    print(
        f"{name}: temperature {calibration.temperature:.4f}; calibration error on "
        f"{len(images):,} validation images {metrics.expected_calibration_error:.2%}, "
        f"uncalibrated {metrics.calibration_error_before:.2%}"
    )


if __name__ == "__main__":
    main()
