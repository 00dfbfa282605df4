"""Draw the pictures of the README and the how-tos, each for light and for dark pages.

    python docs/pictures.py                         # those of examples/cat.jpg by the bundled model
    python docs/pictures.py bundled cifar10 data    # from test images in data/; sheet.png
    vitrail inspect cifar10 --output_path docs/pictures    # insides.png; the data in data/

benchmarks/curves.py draws ``curves.png``, docs/pictures/architecture.py ``architecture.svg``,
docs/pictures/serve.py ``serve.webp``;
``page.png`` is a screenshot of ``vitrail explain cifar10 examples/cat.jpg --format html``.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import vitrail
from vitrail.config.drawing import Look
from vitrail.config.settings import DataConfig
from vitrail.data.datasets import load_data
from vitrail.data.images import ImageSet
from vitrail.explain.draw import save_table
from vitrail.explain.explanation import compare
from vitrail.explain.map_settings import MapSettings, Method
from vitrail.explain.panels import BLACK, INKS, PAPER, scales, show_map

PICTURES = Path(__file__).parent / "pictures"
CAT = Path(__file__).parents[1] / "examples" / "cat.jpg"
THEMES = {"light": "", "dark": "-dark"}
COLUMNS = 7
SHEET: tuple[Method, ...] = ("relevance", "balanced", "occlusion", "shapley")


def draw_cat() -> None:
    """Draw the photograph: an animation, all methods, and all heads."""
    classifier = vitrail.load("cifar10", device="cpu")
    drawings = {
        "cat{}.gif": classifier.explain(CAT, method="relevance"),
        "methods{}.png": classifier.explain(CAT, method="all"),
    }
    for theme, suffix in THEMES.items():
        for name, explanation in drawings.items():
            explanation.save(PICTURES / name.format(suffix), theme=theme)
    heads = classifier.explain(CAT, method="attention", frames="heads")
    heads.save(PICTURES / "heads.png")
    with Image.open(PICTURES / "heads.png") as sheet:  # as wide as pages show it
        small = sheet.convert("RGB").resize((960, 960 * sheet.height // sheet.width))
    small.save(PICTURES / "heads.png", optimize=True)
    classifier.explain(CAT, method="features").save(PICTURES / "features.png")


def test_images(data_path: str) -> ImageSet:
    """Return the first CIFAR-10 test image of each of several classes."""
    data = DataConfig(dataset="cifar10", data_path=Path(data_path))
    images = load_data(data, ("test",), image_hw=(32, 32), n_channels=3).images["test"]
    labels = images.labels_B.tolist()
    wanted = [images.classes.index(name) for name in ("car", "ship", "horse", "dog")]
    wanted += [label for label in range(len(images.classes)) if label not in wanted]
    return images.take([labels.index(label) for label in wanted[:COLUMNS]])


def draw_images(name: str, model: str, data_path: str) -> None:
    """Draw test images with their predictions, and below each what the model looked at."""
    classifier = vitrail.load(model, device="cpu")
    images = test_images(data_path)
    for theme, suffix in THEMES.items():
        figure = Figure((2 * COLUMNS, 4.5), layout="tight", facecolor=PAPER[theme])
        upper, lower = figure.subplots(2, COLUMNS)
        for column, image_CHW in enumerate(images.raw_BCHW):
            raw_HWC: np.ndarray = image_CHW.permute(1, 2, 0).numpy()
            rollout = classifier.explain(raw_HWC, method="rollout")
            look, label = Look(theme=theme), images.classes[int(images.labels_B[column])]
            best = rollout.frames[-1].prediction
            right = best.rpartition(" ")[0] == label
            words, ink = (best, BLACK) if right else (f"{best} ✗ {label}", INKS[False])
            show_map(upper[column], raw_HWC, look=look)
            upper[column].set_title(words, fontsize=14, color=ink[theme])
            map_GJ = rollout.maps_FGJ[-1]
            norm = scales(map_GJ[None], look, shares=True)[0]
            show_map(lower[column], raw_HWC, map_GJ, look=look, norm=norm)
        figure.savefig(PICTURES / f"{name}{suffix}.png", dpi=90)
    pictures = zip(
        images.raw_BCHW[1:4].permute(0, 2, 3, 1).numpy(), images.labels_B[1:4], strict=True
    )
    subjects = [
        classifier.subject(raw_HWC, name=images.classes[int(label)]) for raw_HWC, label in pictures
    ]
    settings = [
        MapSettings(method=method, resolution="patch")
        if method == "balanced"
        else MapSettings(method=method)
        for method in SHEET
    ]
    save_table([compare(subject, settings) for subject in subjects], PICTURES / "sheet.png", Look())


if __name__ == "__main__":
    draw_images(*sys.argv[1:]) if sys.argv[1:] else draw_cat()
