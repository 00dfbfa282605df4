"""Latency and throughput of one model in torch, compiled, ONNX and ONNX int8; and cold starts.

    python benchmarks/export.py --model_path output/quick --rounds 7 --threads 2

Every contestant runs in its own process and they take turns, so that a machine that slows down
affects all of them equally and no library's threads disturb another's. Latency is the median of
single pictures, throughput that of batches; the model is timed on normalized images. A cold start
is ``vitrail predict`` for one picture, from the shell to the result.
"""

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

REST = 0.3
"""Seconds between two turns, for the threads of the last contestant to go to sleep."""
Times = dict[str, list[float]]


def torch_forward(
    path: Path, threads: int, *, compiled: bool
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, ...]]:
    """Return the torch model as a function of an array, and the shape of one image."""
    import torch

    import vitrail

    torch.set_num_threads(threads)
    model = vitrail.load(path, device="cpu").model
    # dynamic: one compilation for both batch sizes, as in a server.
    forward = torch.compile(model, dynamic=True) if compiled else model

    def run(images_BCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(forward(torch.from_numpy(images_BCHW)).numpy())

    return run, (model.config.n_channels, *model.config.image_hw)


def onnx_forward(
    path: Path, threads: int
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, ...]]:
    """Return the exported model as a function of an array, and the shape of one image."""
    from vitrail.inference.onnx_classifier import load_onnx

    exported = load_onnx(path, device="cpu", threads=threads)
    model = exported.config.model

    def run(images_BCHW: np.ndarray) -> np.ndarray:
        return np.asarray(exported.session.run(["logits"], {"images": images_BCHW})[0])

    return run, (model.n_channels, *model.image_hw)


def work(name: str, path: Path, threads: int, pipe: Connection) -> None:
    """Run one contestant: answer each (batch, repeats) with the seconds per batch."""
    if name.startswith("onnx"):
        run, shape = onnx_forward(path, threads)
    else:
        run, shape = torch_forward(path, threads, compiled=name == "torch, compiled")
    random = np.random.default_rng(0)
    while (asked := pipe.recv()) is not None:
        batch, repeats = asked
        images_BCHW = random.standard_normal((batch, *shape), dtype=np.float32)
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            run(images_BCHW)
            times.append(time.perf_counter() - began)
        pipe.send(times)


def take_turns(
    files: Mapping[str, Path], *, rounds: int, threads: int, batches: Mapping[int, int]
) -> dict[int, Times]:
    """Time every contestant at every batch size, A B C D A B C D; the first round is not counted.

    Returns:
        batch size -> contestant -> the median seconds of a batch, one value per round.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name, path in files.items():
        pipes[name], theirs = spawn.Pipe()
        workers.append(spawn.Process(target=work, args=(name, path, threads, theirs), daemon=True))
        workers[-1].start()
    medians: dict[int, Times] = {batch: {name: [] for name in files} for batch in batches}
    for number in range(rounds + 1):
        for batch, repeats in batches.items():
            for name, pipe in pipes.items():
                pipe.send((batch, repeats))
                times = pipe.recv()
                if number:
                    medians[batch][name].append(statistics.median(times))
                time.sleep(REST)
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send(None)
        worker.join()
    return medians


def cold_starts(files: Mapping[str, Path], picture: Path, rounds: int) -> Times:
    """Time ``vitrail predict`` of one picture in a fresh process, in turns."""
    seconds: Times = {name: [] for name in files}
    for number in range(rounds + 1):
        for name, path in files.items():
            words = ["predict", "--model_path", str(path), str(picture)]
            began = time.perf_counter()
            command = [sys.executable, "-m", "vitrail", *words]
            subprocess.run(command, check=True, capture_output=True)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(steady: Mapping[int, Times], cold: Times, **about: Any) -> None:
    """Print one table, and everything as one JSON object on the last line."""
    import torch

    from vitrail.runtime.hardware import describe_environment

    single, many = sorted(steady)
    table = Table(title=f"{about['model']}, {about['threads']} threads", title_justify="left")
    columns = (
        "",
        "ms per picture",
        "min",
        "max",
        f"images/s, batch {many}",
        "min",
        "max",
        "cold s",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name in steady[single]:
        latency = [1000 * seconds for seconds in steady[single][name]]
        speed = [many / seconds for seconds in steady[many][name]]
        row = [f"{f(latency):.2f}" for f in (statistics.median, min, max)]
        row += [f"{f(speed):,.0f}" for f in (statistics.median, min, max)]
        table.add_row(name, *row, f"{statistics.median(cold[name]):.2f}" if name in cold else "")
    Console(width=100).print(table)
    machine = describe_environment(torch.device("cpu"), "float32")
    kept = {name: machine[name] for name in ("versions", "system", "processor")}
    from importlib.metadata import version

    kept["versions"] |= {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    print(json.dumps({**about, "seconds_a_batch": steady, "cold_seconds": cold, "machine": kept}))


def main(model_path: Path, rounds: int = 7, threads: int = 2, batch: int = 64) -> None:
    """Export a model and time it in four forms.

    Args:
        model_path: a run folder or a file of weights.
        rounds: measured rounds, after a warm-up round.
        threads: threads of every contestant.
        batch: images per batch for the throughput.
    """
    import vitrail
    from vitrail.inference.export import quantize, to_onnx

    with TemporaryDirectory() as folder:
        large, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        proto, _ = to_onnx(vitrail.load(model_path, device="cpu"))
        large.write_bytes(proto.SerializeToString())
        small.write_bytes(quantize(proto).SerializeToString())
        files = {"torch": model_path, "torch, compiled": model_path, "onnx": large}
        files["onnx int8"] = small
        batches = {1: 50, batch: 5}
        steady = take_turns(files, rounds=rounds, threads=threads, batches=batches)
        picture = Path(folder) / "picture.png"
        Image.effect_noise((90, 70), 90).convert("RGB").save(picture)
        files = {name: path for name, path in files.items() if name != "torch, compiled"}
        cold = cold_starts(files, picture, rounds)
        about = {"model": model_path.name, "threads": threads, "batch": batch}
        report(steady, cold, **about, bytes={n: p.stat().st_size for n, p in
               (("onnx", large), ("onnx int8", small))})  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
