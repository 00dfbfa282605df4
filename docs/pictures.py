"""Draw the pictures of the README and the how-tos; those named -dark are for dark pages.

    python docs/pictures.py                 # those of examples/cat.jpg, and ranking.png
    python docs/pictures.py cifar10 data    # sheet.png, from test images in data/
    vitrail inspect cifar10 --output_path docs/pictures    # insides.png, with the data in data/

benchmarks/curves.py draws ``curves.png``, docs/pictures/architecture.py ``architecture.svg``,
docs/pictures/serve.py ``serve.webp``;
``page.png`` is a screenshot of ``vitrail explain cifar10 examples/cat.jpg --format html``.
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

import vitrail
from vitrail.config.drawing import Look
from vitrail.config.settings import DataConfig
from vitrail.data.datasets import load_data
from vitrail.explain.draw import save_table
from vitrail.explain.explanation import compare
from vitrail.explain.map_metrics import Estimate
from vitrail.explain.map_report import plot_ranking
from vitrail.explain.map_settings import METHODS, MapSettings
from vitrail.explain.stored_scores import Badge

PICTURES = Path(__file__).parent / "pictures"
ROOT = Path(__file__).parents[1]
CAT = ROOT / "examples" / "cat.jpg"
THEMES = {"light": "", "dark": "-dark"}
CHANGED: dict[str, dict[str, Any]] = {
    "balanced": {"resolution": "patch"},
    "integrated_gradients": {"resolution": "patch"},
    "occlusion": {"window": 3},
}
"""Settings other than the defaults, with which the methods can be compared and pass the tests."""
GALLERY = [MapSettings(method=method, **CHANGED.get(method, {})) for method in METHODS]
SHEETED = ("relevance", "balanced", "occlusion", "shapley")
SHEET = [each for each in GALLERY if each.method in SHEETED]


def draw_cat() -> None:
    """Draw the photograph: an animation, all methods, and all heads."""
    classifier = vitrail.load("cifar10", device="cpu")
    drawings = {
        "cat{}.gif": classifier.explain(CAT, method="balanced", frames="layers"),
        "methods{}.png": compare(classifier.subject(CAT), GALLERY),
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


def draw_ranking() -> None:
    """Draw how faithful each method is to the bundled model, from the recorded scores."""
    found = json.loads((ROOT / "records/map-scores-bundled/scores.json").read_text())
    verdict = vitrail.load("cifar10", device="cpu").verdict
    assert verdict is not None
    best: dict[str, Badge] = {}  # the best variant of each method
    for badge in verdict.badges:
        best.setdefault(badge.method.partition(":")[0], badge)
    controls = {
        score["method"]: Estimate(*(score["measures"]["srg"][key] for key in Estimate._fields))
        for score in found["scores"]
        if score["beats_controls"] is None
    }
    plot_ranking(PICTURES / "ranking.png", verdict._replace(badges=tuple(best.values())), controls)


def draw_sheet(model: str, data_path: str) -> None:
    """Draw test images, one per row, and what the model looked at, one column per method."""
    classifier = vitrail.load(model, device="cpu")
    data = DataConfig(dataset="cifar10", data_path=Path(data_path))
    images = load_data(data, ("test",), image_hw=(32, 32), n_channels=3).images["test"]
    labels = images.labels_B.tolist()
    subjects = [
        classifier.subject(
            images.raw_BCHW[labels.index(images.classes.index(name))].permute(1, 2, 0).numpy(),
            name=name,
        )
        for name in ("ship", "horse", "dog")
    ]
    save_table([compare(subject, SHEET) for subject in subjects], PICTURES / "sheet.png", Look())


if __name__ == "__main__":
    if sys.argv[1:]:
        draw_sheet(*sys.argv[1:])
    else:
        draw_cat()
        draw_ranking()
