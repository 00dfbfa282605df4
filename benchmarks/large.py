"""Seconds and peak memory of every map of a ViT-S at 518 pixels (1,369 patches), as a table.

    python benchmarks/large.py FOLDER PHOTOGRAPH [--methods features,relevance]

FOLDER is the one that benchmarks/dinov2.py wrote. Each map is one `vitrail explain` in a process of
its own; the methods that explain a class use a random, meaningless head of 10 classes.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import vitrail
from vitrail.explain.map_settings import CLASSLESS, METHODS, VIEWS
from vitrail.model.vit import VisionTransformer
from vitrail.weights.checkpoint import CheckpointInfo, save_weights_file

SLOW = ("occlusion", "shapley")
"""Left out unless requested: they take more than a thousand passes."""
GIB = 2**20
"""In KiB, the unit in which Linux reports a process's memory."""


def add_classes(folder: Path, path: Path) -> None:
    """Write the network for 518 pixels with a random head for 10 classes."""
    torch.manual_seed(0)
    backbone = vitrail.load(folder, image_size=518, device="cpu")
    model = dataclasses.replace(backbone.config.model, n_classes=10, pool="cls_mean")
    weights = VisionTransformer(model).state_dict() | backbone.model.state_dict()
    config = dataclasses.replace(backbone.config, model=model)
    save_weights_file(path, CheckpointInfo(config, tuple("abcdefghij"), {}, {}), weights)


def measure(command: list[str]) -> tuple[float, float]:
    """Return the seconds and the GiB of a process, or fail if it does."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - began, usage.ru_maxrss / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("photograph", type=Path)
    parser.add_argument("--methods", help="default: all but occlusion and shapley, and a page")
    args = parser.parse_args()
    default = [each for each in (*VIEWS, *METHODS, "page") if each not in SLOW]
    methods = args.methods.split(",") if args.methods else default
    with tempfile.TemporaryDirectory() as temporary:
        with_classes = Path(temporary) / "classes.safetensors"
        add_classes(args.folder, with_classes)
        print("| method | seconds | peak memory |\n|---|---|---|")
        for method in methods:
            network = args.folder if method in (*CLASSLESS, "page") else with_classes
            ending = "html" if method == "page" else "png"
            shown = [] if method == "page" else ["--method", method]
            seconds, gib = measure([
                sys.executable, "-m", "vitrail", "explain", str(args.photograph), *shown,
                "--model_path", str(network), "--image_size", "518",
                "--output_path", f"{temporary}/{method}.{ending}",
            ])  # fmt: skip
            print(f"| {method} | {seconds:.1f} | {gib:.2f} GiB |", flush=True)


if __name__ == "__main__":
    main()
