"""A simulation on the CPU of a device that cannot do everything: Apple's MPS.

Inside ``limited_device()`` tensors may be moved to, and made on, ``torch.device("mps")``. They
compute on the CPU, but refuse what MPS refuses: float64, the decompositions of ``torch.linalg``,
generators of another device, and operations between tensors of two devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

DEVICE = torch.device("mps", 0)  # with its number, or torch asks the driver for it
CROSSING = {"_to_copy", "copy_", "index", "index_put", "index_put_"}
"""Operations that take tensors of two devices: copies, and indices on the CPU."""


class DeviceTensor(Tensor):
    """A CPU tensor that says it is on DEVICE, and refuses operations that DEVICE cannot do."""

    inner: Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        # On "meta" for torch's own eyes: autograd then needs no driver of the device.
        with torch.inference_mode(False):  # views of ordinary tensors must be ordinary
            return Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, device=torch.device("meta"),
            )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        super().__init__()
        self.inner = inner

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The simulated device."""
        return DEVICE

    is_meta = False

    def __getitem__(self, index: Any) -> Tensor:
        """Index by lists, too: torch would make a tensor without content of them on "meta"."""
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(p) if type(p) is list else p for p in parts))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.inner!r} on {DEVICE}"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "DeviceTensor":
        return DeviceTensor(inner["inner"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(function, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """Moves tensors to DEVICE, or makes them there, where an operation asks for it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(function, args, kwargs or {})


OPERATIONS: set[str] = set()
"""The operations that DEVICE has run, by their names in torch's native_functions.yaml."""
MOVED: list[int] = []
"""Bytes of each tensor that was moved from the CPU to DEVICE."""


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation of torch on the CPU, if the devices concerned can do it."""
    name = function.overloadpacket.__name__
    there: list[Tensor] = []
    elsewhere: list[Tensor] = []

    def unwrap(value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            there.append(value)
            return value.inner
        if isinstance(value, Tensor) and value.ndim:
            elsewhere.append(value)
        return value

    plain_args, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    target = kwargs.get("device")
    made_here = bool(there) if target is None else is_device(torch.device(target))
    if there or made_here:
        OPERATIONS.add(str(function))
        if "linalg" in name and name != "linalg_vector_norm":
            raise NotImplementedError(f"aten::{name} is not implemented for {DEVICE}")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: a generator of another device than {DEVICE}")
    if there and elsewhere and name not in CROSSING:
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on {elsewhere[0].device}")
    if target is not None and made_here:
        plain_kwargs["device"] = torch.device("cpu")
    if name == "_to_copy" and made_here and not there:
        MOVED.append(args[0].nbytes)
    result = function(*plain_args, **plain_kwargs)
    if name == "copy_":
        made_here = isinstance(args[0], DeviceTensor)
    if not made_here:
        return args[0] if name == "copy_" else result
    wrapped = tree_map(wrap, result)
    if there and target is None:
        return return_and_correct_aliasing(function, args, kwargs, wrapped)
    return wrapped


def is_device(device: torch.device) -> bool:
    """Whether this is DEVICE, or "meta" where torch means a DeviceTensor's device by it."""
    inside = device.type == "meta" and torch.get_default_device().type != "meta"
    return device.type == DEVICE.type or inside


def wrap(value: Any) -> Any:
    """Put a tensor on DEVICE.

    Raises:
        TypeError: its numbers are of a type that DEVICE does not have.
    """
    if not isinstance(value, Tensor):
        return value
    if value.dtype in (torch.float64, torch.complex128):
        raise TypeError(f"{DEVICE} does not support {value.dtype}")
    return DeviceTensor(value)


@contextmanager
def limited_device() -> Iterator[torch.device]:
    """Allow tensors on DEVICE inside the block."""
    with OnDevice():  # type: ignore[no-untyped-call]
        yield DEVICE
