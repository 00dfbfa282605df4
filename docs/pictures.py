"""Draw the README's picture: ``python docs/pictures.py MODEL docs/pictures/attention.png``."""

import sys

from matplotlib.figure import Figure

import vitrine
from vitrine.data.shapes import load_shapes
from vitrine.explain.render import dim, normalise, place

COLUMNS = 7


def main(model: str, out: str) -> None:
    """Draw test shapes in the upper row, and below each what got the model's attention."""
    classifier = vitrine.load(model, device="cpu")
    figure = Figure(figsize=(2 * COLUMNS, 4.4), layout="tight", facecolor="white")
    axes = figure.subplots(2, COLUMNS)
    for index, raw_CHW in enumerate(load_shapes("test").first(COLUMNS).raw_BCHW):
        raw_HWC = raw_CHW.permute(1, 2, 0).numpy()
        rollout = classifier.explain(raw_HWC)
        map_GJ = normalise(rollout.maps_FGJ, "frame")[-1]
        axes[0, index].imshow(raw_HWC)
        axes[0, index].set_title(rollout.frames[-1].says, fontsize=13)
        axes[1, index].imshow(dim(raw_HWC, place(map_GJ, (32, 32), (32, 32), "crop")))
        for row in axes[:, index]:
            row.set_axis_off()
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
