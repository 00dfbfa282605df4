"""The choice of device, number format and torch.compile; the machine's description for env.json."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vitrail.errors import ConfigError
from vitrail.runtime import distributed

LONG_RUN = 2000
"""Updates in a run for which compiling on CUDA pays off: a rule of thumb, not measured."""
PACKAGES = ("vitrail", "torch", "numpy", "pillow", "safetensors")


def choose_device(name: str) -> torch.device:
    """Return the device with this name, if it is there; ``auto`` prefers cuda, then mps."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there = [device for device, yes in usable.items() if yes] + ["cpu"]
    if name != "auto" and name not in there:
        raise ConfigError(
            f"device {name} is not available in this PyTorch, only {', '.join(there)}"
        )
    return torch.device(there[0] if name == "auto" else name)


def choose_rank_device(name: str) -> torch.device:
    """Return this rank's device: the nth rank of a machine computes on its nth GPU.

    Raises:
        ConfigError: it is not available, or the ranks would compute on different kinds.
    """
    device = distributed.each(choose_own_device, name)
    kinds = distributed.gather(device.type)
    if len(set(kinds)) > 1:
        raise ConfigError(
            f"the processes compute on {' and '.join(sorted(set(kinds)))}: give --device cpu, or "
            "use machines of one kind"
        )
    return device


def choose_own_device(name: str) -> torch.device:
    """Return the device with this name if this rank can use it."""
    device = choose_device(name)
    if distributed.count() > 1 and device.type == "mps":
        raise ConfigError("device mps supports one process only: give --device cpu")
    there, place = torch.cuda.device_count(), distributed.local_rank()
    if distributed.count() > 1 and device.type == "cuda" and place >= there:
        raise ConfigError(
            f"process {place + 1} of this machine has no GPU, there are only {there}: give "
            f"torchrun --nproc-per-node {there}, or --device cpu"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return bfloat16 or float32; ``auto`` takes bfloat16 where it is faster."""
    fast = name == "bfloat16" or (name == "auto" and multiplies_bfloat16(device))
    return torch.bfloat16 if fast else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies faster in bfloat16 than in float32.

    Intel processors with AVX512_BF16 but without AMX do not (docs/log.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    intel = str(found.get("cpu_name")).startswith("Intel")
    return bool(found.get("amx_bf16") or (found.get("avx512_bf16") and not intel))


def choose_compile(name: str, device: torch.device, updates: int) -> bool:
    """Return whether to compile a model for a run; ``auto`` does so for long runs on CUDA.

    On a CPU, steps become from 25% slower (with dropout) to 10% faster (docs/log.md), after 15 to
    35 seconds of compiling, which also needs a C++ compiler: seldom worth it.
    """
    return name == "on" or (name == "auto" and device.type == "cuda" and updates >= LONG_RUN)


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Return versions, machine, device and number format."""
    gpu = f": {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return {
        "versions": package_versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "processes": distributed.count(),
        "threads": torch.get_num_threads(),
        "device": device.type + gpu,
        "precision": precision,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
            found[name] = "not installed"
    return found


def processor_name() -> str:
    """Return the processor's name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
