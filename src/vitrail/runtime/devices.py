"""The choice of device, number format and torch.compile."""

import torch

from vitrail.errors import ConfigError
from vitrail.runtime import distributed

LONG_RUN = 2000
"""Updates from which compiling a run on CUDA is worth its time: a rule of thumb, not measured."""


def choose_device(name: str) -> torch.device:
    """Return the device with this name; ``auto`` prefers cuda, then mps, then cpu.

    Raises:
        ConfigError: PyTorch has no such device on this machine.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if not available.get(name, False):
        there = ", ".join(device for device, yes in available.items() if yes)
        raise ConfigError(f"device {name} is not available in this PyTorch, only {there}")
    return torch.device(name)


def choose_rank_device(name: str) -> torch.device:
    """Return this rank's device: the nth rank of a machine computes on its nth GPU.

    Raises:
        ConfigError: it is not available, or the ranks would compute on different kinds.
    """
    device = distributed.each(choose_own_device, name)
    kinds = distributed.gather(device.type)
    if len(set(kinds)) > 1:
        other = next(n for n, kind in enumerate(kinds) if kind != kinds[0])
        raise ConfigError(
            f"process 0 computes on {kinds[0]}, process {other} on {kinds[other]}: give "
            "--device cpu, or use machines of one kind"
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
            f"process {place + 1} of this machine has {there} GPUs: give torchrun "
            f"--nproc-per-node {there}, or --device cpu"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return bfloat16 or float32; ``auto`` takes bfloat16 where the hardware supports it."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def choose_compile(name: str, device: torch.device, updates: int) -> bool:
    """Return whether to compile a model for a run; ``auto`` does so for long runs on CUDA.

    On a CPU, steps become 0 to 10% faster after half a minute or more of compiling (docs/log.md),
    which also needs a C++ compiler; this is seldom worth it.
    """
    return name == "on" or (name == "auto" and device.type == "cuda" and updates >= LONG_RUN)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16 products."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_multiplies_bfloat16()


def _cpu_multiplies_bfloat16() -> bool:
    """Return whether the processor has AVX512_BF16 or AMX, as far as torch knows."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    # Older torch without get_capabilities. These functions are private and may disappear.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = (getattr(torch.cpu, name, None) for name in names)
    return any(check() for check in checks if check is not None)
