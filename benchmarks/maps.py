"""Speed and memory of maps in batches, compared with single calls that record attention with hooks.

    python benchmarks/maps.py --images 10000 --rounds 3

The map is the attention of the last layer, averaged over heads, as the head reads it. The first row
is the baseline: what tools do for a model that does not return its attention.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from speed.worker import peak_mib
from speed.workers import interleave
from vitrail.cli.process import keep_freed_memory
from vitrail.config.presets import get_preset
from vitrail.explain.map_settings import MapSettings
from vitrail.explain.methods import Maps, compute_maps, read_maps
from vitrail.model.layers import rotate
from vitrail.model.vit import Block, VisionTransformer
from vitrail.runtime.hardware import describe_environment


def hooked(model: VisionTransformer, image_BCHW: Tensor, blocks: list[Block]) -> Tensor:
    """Return the last layer's map (B, G, J), its attention recomputed from what hooks recorded."""
    caught: list[Tensor] = []

    def catch(_: object, __: object, qkv_BTX: Tensor) -> None:
        B, T, X = qkv_BTX.shape
        A = model.config.n_attention_heads
        q_BATK, k_BATK, _v = qkv_BTX.view(B, T, 3, A, X // 3 // A).permute(2, 0, 3, 1, 4)
        if model.rotation is not None:
            q_BATK, k_BATK = rotate(q_BATK, model.rotation), rotate(k_BATK, model.rotation)
        caught.append((q_BATK @ k_BATK.mT / q_BATK.shape[-1] ** 0.5).softmax(dim=-1))

    handles = [block.attention.qkv.register_forward_hook(catch) for block in blocks]
    with torch.no_grad():
        model(image_BCHW)
    for handle in handles:
        handle.remove()
    return read_maps(model, caught[-1].mean(dim=1), None)


def bfloat16(model: VisionTransformer, images_BCHW: Tensor, settings: MapSettings) -> Maps:
    """Return the maps of a model under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return compute_maps(model, images_BCHW, settings)


def timed(images_BCHW: Tensor, explain: Callable[[Tensor], object]) -> Callable[[], float]:
    """Return a function that explains the images and returns the images per second."""

    def measure() -> float:
        began = time.perf_counter()
        explain(images_BCHW)
        return len(images_BCHW) / (time.perf_counter() - began)

    return measure


def report(title: str, speeds: dict[str, list[float]], **about: object) -> None:
    """Print the table, and everything as one JSON object on the last line."""
    table = Table(title=title, title_justify="left")
    for column in ("", "images/s", "min", "max", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    first = next(iter(medians.values()))
    for name, values in speeds.items():
        figures = (medians[name], min(values), max(values))
        table.add_row(name, *(f"{f:,.0f}" for f in figures), f"{medians[name] / first:.2f}")
    Console().print(table)
    machine = describe_environment(torch.device("cpu"), "")
    kept = {name: machine[name] for name in ("versions", "system", "processor", "threads")}
    print(json.dumps({"title": title, **about, "images_per_second": speeds, "machine": kept}))


def main(
    preset: str = "reference",
    layers: int = 6,
    images: int = 10_000,
    single: int = 500,
    rounds: int = 3,
) -> None:
    """Time maps of random images by a fresh model (neither changes the speed).

    Args:
        preset: the preset whose model is used.
        layers: number of blocks.
        images: images per round, explained in batches.
        single: images per round, explained one by one.
        rounds: measured rounds, after a warm-up round.
    """
    keep_freed_memory()  # as the commands do
    config = dataclasses.replace(get_preset(preset).model, n_layers=layers, n_classes=10)
    model = VisionTransformer(config).eval()
    images_BCHW = torch.randn(images, config.n_channels, *config.image_hw)
    settings = MapSettings(layers=(layers,))
    every: list[Block] = list(model.blocks)  # type: ignore[arg-type]

    def one_by_one(explain: Callable[[Tensor], object]) -> Callable[[], float]:
        return timed(images_BCHW[:single], lambda some: [explain(image) for image in some.split(1)])

    expected_BGJ = torch.cat([hooked(model, image, every) for image in images_BCHW[:9].split(1)])
    ours_BGJ = compute_maps(model, images_BCHW[:9], settings).values_BLGJ[:, 0]
    torch.testing.assert_close(ours_BGJ, expected_BGJ)
    half_BGJ = bfloat16(model, images_BCHW[:9], settings).values_BLGJ[:, 0]
    apart = ((half_BGJ - ours_BGJ).abs() / ours_BGJ.amax(dim=(1, 2), keepdim=True)).max().item()
    speeds = interleave(
        {
            "one by one, hooks in every layer": one_by_one(lambda x: hooked(model, x, every)),
            "one by one, a hook in the last": one_by_one(lambda x: hooked(model, x, every[-1:])),
            "one by one, compute_maps": one_by_one(lambda x: compute_maps(model, x, settings)),
            "in batches, compute_maps": timed(
                images_BCHW, lambda some: compute_maps(model, some, settings)
            ),
            "in batches, compute_maps, bfloat16": timed(
                images_BCHW, lambda some: bfloat16(model, some, settings)
            ),
        },
        rounds=rounds,
    )
    peak = round(peak_mib("cpu") / 2**10, 2)
    print(f"Peak memory of the process, including {images} images: {peak} GiB")
    print(f"bfloat16: entries of a map differ by at most {apart:.1e} of its largest")
    about = {"preset": preset, "layers": layers, "images": images, "peak_gib": peak}
    report(f"Maps, {preset} with {layers} layers", speeds, **about)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
