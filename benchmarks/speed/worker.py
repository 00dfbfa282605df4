"""A worker process: it builds one workload, then measures it once per request.

Needs only torch, so that the interpreters of other systems can import it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Spec = dict[str, Any]
"""What to measure; ``Job.spec`` in ``jobs.py`` lists the fields."""
Measure = Callable[[Any], float]
"""Does the work of one request and returns its amount (images or operations)."""


def serve(build: Callable[[Spec], tuple[Measure, dict[str, Any]]], spec: Spec) -> None:
    """Build what the spec names, report it, then measure once for each line of standard input."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to standard error

    def send(**answer: Any) -> None:
        print(json.dumps(answer), file=channel, flush=True)

    rest_mib = peak_mib(spec["device"])
    measure, about = build(spec)
    send(rest_mib=rest_mib, torch=torch.__version__, threads=torch.get_num_threads(), **about)
    synchronize = getattr(torch, spec["device"]).synchronize
    for line in sys.stdin:
        request = json.loads(line)
        synchronize()
        began = time.perf_counter()
        done = measure(request)
        synchronize()
        seconds = time.perf_counter() - began
        send(done=done, seconds=seconds, peak_mib=peak_mib(spec["device"]))


def peak_mib(device: str) -> float:
    """Return the peak memory so far in MiB: of the GPU on CUDA, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent's memory at fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def autocast(spec: Spec) -> Any:
    """Return the autocast context for the spec's precision."""
    wanted = spec["precision"] == "bfloat16"
    return torch.autocast(spec["device"], torch.bfloat16, enabled=wanted)


def random_batch(spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and labels on the device."""
    torch.manual_seed(1)
    model, count = spec["model"], spec["batch_size"]
    side = model["image_size"]
    images = torch.randn(count, model["n_channels"], side, side)
    labels = torch.randint(model["n_classes"], (count,))
    return images.to(spec["device"]), labels.to(spec["device"])
