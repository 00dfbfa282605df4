"""Draw the README's pictures.

    python docs/pictures.py output/quick docs/pictures/attention.png
    python docs/pictures.py cifar10 docs/pictures/bundled.png data     (CIFAR-10 in data/)

Upper row: images of the test split with the model's predictions. Lower row: what the model attended
to.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import vitrail
from vitrail.config.settings import DataConfig, Look
from vitrail.data.datasets import load_data
from vitrail.data.shapes import load_shapes
from vitrail.explain.sheet import show_map

COLUMNS = 7


def test_images(data_path: str | None) -> list[np.ndarray]:
    """Return generated shapes, or the first CIFAR-10 test image of each of several classes."""
    if data_path is None:
        return list(load_shapes("test").first(COLUMNS).raw_BCHW.permute(0, 2, 3, 1).numpy())
    data = DataConfig(dataset="cifar10", data_path=Path(data_path))
    images = load_data(data, ("test",), image_hw=(32, 32), n_channels=3).images["test"]
    labels = images.labels_B.tolist()
    wanted = [images.classes.index(name) for name in ("cat", "car", "ship", "horse")]
    wanted += [label for label in range(len(images.classes)) if label not in wanted]
    firsts = [labels.index(label) for label in wanted[:COLUMNS]]
    return list(images.raw_BCHW[firsts].permute(0, 2, 3, 1).numpy())


def main(model: str, out: str, data_path: str | None = None) -> None:
    """Draw them."""
    classifier = vitrail.load(model, device="cpu")
    figure = Figure(figsize=(2 * COLUMNS, 4.4), layout="tight", facecolor="white")
    axes = figure.subplots(2, COLUMNS)
    for index, raw_HWC in enumerate(test_images(data_path)):
        rollout = classifier.explain(raw_HWC)
        show_map(axes[0, index], raw_HWC, look=Look())
        axes[0, index].set_title(rollout.frames[-1].prediction, fontsize=13)
        show_map(axes[1, index], raw_HWC, rollout.maps_FGJ[-1], look=Look(style="reference"))
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
