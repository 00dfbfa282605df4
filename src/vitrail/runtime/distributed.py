"""The processes of one run, the ranks: how they meet, and everything that passes between them.

torchrun starts N processes. Each runs the same program on its share of the images; the first, the
leader, is the only one that writes the run folder and prints. For a single process, every function
here does nothing, so the rest of the code reads as if there were only one. CPU tensors and objects
are sent with gloo, CUDA tensors with NCCL.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitrail.errors import ConfigError, TrainingError, VitrailError

MEETING_SECONDS = 600.0
"""How long a rank waits for the others to start."""
ANSWER_SECONDS = 5.0
"""How long it waits for a leader that may be dead."""

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Inside the block, be one of the ranks; which one is in torchrun's environment variables.

    Nested blocks change nothing.

    Raises:
        TrainingError: the other ranks cannot be reached.
    """
    if dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())  # what "cuda" means from here on
        backend = "cpu:gloo,cuda:nccl"
    with _communicating():
        number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        job = _job_store()
        store = None if job is None else _meeting_store(job, number)
        dist.init_process_group(backend, store=store, rank=number, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _communicating() -> Iterator[None]:
    """Raise TrainingError if another rank does not answer."""
    try:
        yield
    except RuntimeError as error:  # of gloo or the store, in many wordings
        reason = str(error).partition("] ")[2].partition(". ")[0] or str(error)
        raise TrainingError(
            f"process {os.environ.get('RANK', '0')} lost contact with another process "
            f"({reason:.100}), which was killed or failed with its own error. Resume from the last "
            "checkpoint with --resume RUN_FOLDER, or let torchrun restart with --max-restarts"
        ) from error


def _job_store() -> Any:
    """Return torchrun's key-value store, which outlives restarts; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with _communicating():
        return PrefixStore("vitrail", TCPStore(host, port, is_master=False))


def _meeting_store(job: Any, number: int) -> Any:
    """Return a new store, hosted by the leader, for the ranks between two restarts.

    torchrun's own store survives a restart, and with it the addresses of dead ranks: a rank that
    reads one before it is updated would wait forever. A dead leader's port does not answer, so
    here the others retry until the new leader's does.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, until = os.environ["MASTER_ADDR"], time.monotonic() + MEETING_SECONDS
    if number == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        job.set("leader", str(store.port))
        return store
    while True:
        address = host, int(job.get("leader"))
        try:
            socket.create_connection(address, ANSWER_SECONDS).close()
            return TCPStore(*address, is_master=False)
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(f"no answer from {host}:{address[1]}") from error
            time.sleep(0.1)


def store_value(key: str, value: str) -> None:
    """Store a value for the lifetime of this torchrun job, which includes restarts of its ranks."""
    store = _job_store()
    if store is not None:
        store.set(key, value)


def load_value(key: str) -> str | None:
    """Return the value that store_value() stored in this job, or None."""
    store = _job_store()
    return str(store.get(key).decode()) if store is not None and store.check([key]) else None


# Ranks and their shares


def count() -> int:
    """Return the number of ranks: 1 for a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_leader() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def require_work(batch_size: int) -> None:
    """Raise ConfigError if a batch has less than one image per rank."""
    if batch_size < count():
        raise ConfigError(
            f"batch_size is {batch_size}, but {count()} processes share it: raise it, or give "
            "torchrun a lower --nproc-per-node"
        )


def rows(length: int, *, chunk: int = 1) -> slice:
    """Return which of ``length`` rows belong to this rank: an equal number of chunks for each.

    Every row belongs to one rank, in order; where they do not divide equally, the first ranks have
    one more chunk. A rank may have none.
    """
    chunks = -(-length // chunk)
    least, over = divmod(chunks, count())
    start, stop = (r * least + min(r, over) for r in (rank(), rank() + 1))
    return slice(min(start * chunk, length), min(stop * chunk, length))


def share(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor."""
    return tensor[rows(len(tensor))]


def own_index(index: int) -> int:
    """Return a different index on each rank, for different random numbers; the leader's is kept."""
    return index + (rank() << 40)


# Tensors and objects


def merge(model: nn.Module, *sums: Tensor) -> None:
    """Sum gradients and ``sums`` over the ranks, in place, and average running statistics.

    If each rank's loss is the sum over its share divided by the size of the whole batch, the
    gradients become those of the whole batch. Running statistics (of batch norm) are all persistent
    floating-point buffers of modules in training mode: their update is linear, so the mean over
    ranks is the update by all images. Those of frozen modules are not touched.
    """
    if count() == 1:
        return
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        if weight.grad is None:  # this rank's share was empty
            weight.grad = torch.zeros_like(weight)
    statistics = [
        tensor.div_(count())
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not isinstance(tensor, nn.Parameter)
        and tensor.is_floating_point()
        and model.get_submodule(name.rpartition(".")[0]).training
    ]
    tensors = [*(w.grad for w in weights if w.grad is not None), *sums, *statistics]
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])  # one message
    with _communicating():
        dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view(tensor.shape))


def copy_from_leader(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the leader's."""
    for tensor in tensors if count() > 1 else ():
        buffer = tensor.detach().contiguous()
        with _communicating():
            dist.broadcast(buffer, src=0)
        tensor.detach().copy_(buffer)


def gather(value: T) -> list[T]:
    """Return every rank's value, on every rank."""
    values = [value] * count()
    if count() > 1:
        with _communicating():
            dist.all_gather_object(values, value)
    return values


def join_rows(part: Tensor | None) -> Tensor:
    """Return the rows of all ranks, in order, on every rank. Pass None for no rows."""
    return torch.cat([rows for rows in gather(part) if rows is not None])


def highest(number: int) -> int:
    """Return the highest of the ranks' numbers: a request to one, such as a signal, reaches all."""
    if count() == 1:
        return number
    tensor = torch.tensor(number)
    with _communicating():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


# Calls whose errors are raised on all ranks, so that all stop at the same place


def on_leader(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the leader; every rank returns what it returned, or raises its error."""
    if count() == 1:
        return function(*args, **kwargs)
    outcome: list[Any] = [None]
    if is_leader():
        try:
            outcome = [function(*args, **kwargs)]
        except (VitrailError, SystemExit) as error:
            outcome = [error]
    with _communicating():
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], VitrailError | SystemExit):
        raise outcome[0]
    value: T = outcome[0]
    return value


def each(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on every rank; if it fails on one, all raise. It must not communicate."""
    if count() == 1:
        return function(*args, **kwargs)
    error: VitrailError | None = None
    try:
        value = function(*args, **kwargs)
    except VitrailError as caught:
        error = caught
    for number, raised in enumerate(gather(error)):
        if raised is not None:
            raise raised if number == 0 else type(raised)(f"process {number}: {raised}")
    return value


def first_on_machine(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the first rank of every machine; then on the others, to find its files."""
    first = local_rank() == 0
    value = each(lambda: function(*args, **kwargs) if first else None)
    return each(lambda: value if first else function(*args, **kwargs))  # type: ignore[return-value]
