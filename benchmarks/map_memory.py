"""Peak memory of explaining many images, for every method: it must not grow with their number.

    python benchmarks/map_memory.py cifar10 --images 10000

Every method is measured in its own processes, at two numbers of images: the peak above the memory
in use once the model and the images are loaded and one image has been explained. Only the images
and the maps grow, so the last column extrapolates the second peak to ``--images``. (Methods that
take many passes use fewer images, and Shapley values a single pair of orders.)
"""

import json
import subprocess
import sys
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import vitrail
from speed.worker import peak_mib
from vitrail.explain.map_settings import METHODS, VIEWS, MapSettings, Method
from vitrail.explain.methods import compute_maps
from vitrail.runtime.hardware import describe_environment

COUNTS = (600, 2400)
SLOW: dict[Method, tuple[int, int]] = {
    "integrated_gradients": (200, 400), "occlusion": (100, 200), "shapley": (100, 200),
}  # fmt: skip


def measure(source: str, method: Method, images: int) -> dict[str, float]:
    """Return MiB: of the process before the maps, of its peak, and of an image with its maps."""
    model = vitrail.load(source, device="cpu").model
    images_BCHW = torch.randn(images, model.config.n_channels, *model.config.image_hw)
    more = {"passes": 2} if method == "shapley" else {}
    compute_maps(model, images_BCHW[:1], MapSettings(method=method, **more))
    before = peak_mib("cpu")
    maps = compute_maps(model, images_BCHW, MapSettings(method=method, **more))
    arrays = images_BCHW.nbytes + maps.values_BLGJ.nbytes
    return {"before": before, "peak": peak_mib("cpu"), "per_image": arrays / images / 2**20}


def main(
    source: tyro.conf.Positional[str] = "cifar10",
    images: int = 10_000,
    only: Literal["", Method] = "",
    count: int = 0,
) -> None:
    """Measure every method, and print a table and a line of JSON.

    Args:
        source: the model.
        images: the number of images to extrapolate to.
        only: measure this method in this process, on ``count`` images.
        count: number of images, with ``only``.
    """
    if only:
        print(json.dumps(measure(source, only, count)))
        return
    table = Table("method", "images", "MiB above the start", f"process at {images:,}")
    rows = []
    for method in (*METHODS, *VIEWS):
        found = []
        for number in SLOW.get(method, COUNTS):
            words = [source, "--only", method, "--count", str(number)]
            run = subprocess.run(
                [sys.executable, __file__, *words], check=True, capture_output=True, text=True
            )
            found.append({"images": number, **json.loads(run.stdout)})
        many = found[-1]
        total = many["peak"] + many["per_image"] * (images - many["images"])
        rows.append({"method": method, "runs": found, "estimated": round(total)})
        table.add_row(
            method,
            " and ".join(f"{run['images']}" for run in found),
            " and ".join(f"{run['peak'] - run['before']:.0f}" for run in found),
            f"{total:,.0f} MiB",
        )
    Console().print(table)
    machine = describe_environment(torch.device("cpu"), "")
    kept = {name: machine[name] for name in ("versions", "system", "processor", "threads")}
    print(json.dumps({"model": source, "images": images, "methods": rows, "machine": kept}))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
