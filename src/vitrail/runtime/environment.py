"""The software and hardware that a run used, for env.json and ``vitrail info``."""

import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vitrail.runtime import distributed

PRIVATE = re.compile(r"path|name|config|resume|init\b")
"""Matches flags whose values are paths or names."""
PATH_MARKS = "/\\~"
HIDDEN = "[path or name]"
PACKAGES = ("vitrail", "torch", "numpy", "pillow", "safetensors")


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Return versions, machine, device and number format; nothing that identifies a person."""
    return {
        "versions": {"python": platform.python_version(), **package_versions()},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "processes": distributed.count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "precision": precision,
        "command": [Path(sys.argv[0]).name, *public_words(sys.argv[1:])],
    }


def public_words(words: Sequence[str]) -> list[str]:
    """Return the command line without paths and names, which may identify a person."""
    shown: list[str] = []
    private = False
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if flag:
            private = bool(PRIVATE.search(flag))
        hidden = bool(value) and (private or any(mark in value for mark in PATH_MARKS))
        shown.append(flag + equals + (HIDDEN if hidden else value))
    return shown


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
            found[name] = "not installed"
    return found


def processor_name() -> str:
    """Return the processor's name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the device, with the GPU's name if it is one."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
