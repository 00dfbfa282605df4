"""How much of a class's map lies in its tile, in mosaics of four test images, for each method.

    python benchmarks/mosaics.py cifar10 --mosaics 500 --methods gradcam occlusion:window=3

As in ``explain --score``, but on more images. Prints for what share of the tiles the class is among
the four most probable ones, then a line for each method.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import vitrail
from vitrail.cli.process import keep_freed_memory
from vitrail.explain.map_metrics import estimate_mean
from vitrail.explain.map_settings import METHODS, read_variant, settings_of_all
from vitrail.explain.sanity import TILES, enlarge, make_mosaics, shares_in_tiles
from vitrail.training.run_folder import load_split


@dataclass(frozen=True)
class Options:
    """Measure how much of the maps lies in the right tile of mosaics."""

    model: Annotated[str, tyro.conf.Positional]
    mosaics: int = 500
    methods: tuple[str, ...] = METHODS
    """Methods, and variants of them."""
    data_path: Path = Path("data")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    keep_freed_memory()  # otherwise page faults take a third of the time
    classifier = vitrail.load(options.model, device="cpu")
    images = load_split(classifier, "test", data_path=options.data_path)
    # More images than needed, as the classes are not equally frequent.
    raw_BCHW = images.raw_BCHW[: options.mosaics * TILES * 5 // 4]
    images_BCHW = classifier.normalize(raw_BCHW.permute(0, 2, 3, 1).numpy())
    found = make_mosaics(images_BCHW, images.labels_B[: len(raw_BCHW)])
    mosaics_MCHW, classes_M4 = (each[: options.mosaics] for each in found)
    reader = enlarge(classifier.model)
    with torch.inference_mode():
        logits_MY = torch.cat([reader(part) for part in mosaics_MCHW.split(100)])
    seen = (logits_MY.topk(TILES).indices[:, :, None] == classes_M4[:, None]).any(1)
    print(json.dumps({"mosaics": len(mosaics_MCHW), "tiles_seen": seen.double().mean().item()}))
    for method in options.methods:
        (settings,) = settings_of_all([read_variant(method)], passes=128)
        began = time.perf_counter()
        shares_M4 = shares_in_tiles(reader, mosaics_MCHW, classes_M4, settings)
        row = {"method": method, **estimate_mean(shares_M4.mean(1))._asdict()}
        row["seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
