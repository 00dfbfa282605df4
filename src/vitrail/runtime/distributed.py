"""What the processes of one run do together. For a process alone every function here does nothing.

torchrun starts N processes, the ranks. Each runs the same program on its share of the images; the
first one, the leader, alone has the run folder and speaks. Whatever passes between them passes
through this file, so that the rest reads as if there were one process:

    share, rows       which images are this rank's
    merge             gradients and losses of the shares -> those of the whole batch
    join_rows         what each rank found out about its images -> all of it, on every rank
    on_leader, each   an error of one rank is raised on all, so that all stop at the same place
    highest           a request to one rank, such as a signal, reaches all
    copy_from_leader  the leader's tensors, everywhere

CPU tensors and objects travel by gloo, CUDA tensors by NCCL.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitrail.errors import ConfigError, VitrailError
from vitrail.runtime.rendezvous import communicating, meet

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks inside the block; torchrun tells by the environment which.

    Inside another such block it changes nothing.

    Raises:
        TrainingError: the others cannot be reached.
    """
    if dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())  # what "cuda" means from here on
        backend = "cpu:gloo,cuda:nccl"
    meet(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """Return how many ranks there are: 1 for a process alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_leader() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    return rank() == 0


def require_work(batch_size: int) -> None:
    """Refuse a batch that leaves ranks idle.

    Raises:
        ConfigError: it has fewer images than there are ranks.
    """
    if batch_size < count():
        raise ConfigError(
            f"batch_size is {batch_size}, but there are {count()} processes to share it: raise "
            "it, or give torchrun a lower --nproc-per-node"
        )


def rows(length: int, *, chunk: int = 1) -> slice:
    """Return which of ``length`` rows are this rank's: whole chunks of them, all ranks alike.

    Every row is one rank's, and they are in order. A rank may have none.
    """
    chunks = -(-length // chunk)
    least, over = divmod(chunks, count())
    start, stop = (r * least + min(r, over) for r in (rank(), rank() + 1))
    return slice(min(start * chunk, length), min(stop * chunk, length))


def share(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor."""
    return tensor[rows(len(tensor))]


def own_index(index: int) -> int:
    """Return another index for each rank, to draw other random numbers; the leader's is its own."""
    return index + (rank() << 40)


def merge(model: nn.Module, *sums: Tensor) -> None:
    """Add up gradients and ``sums`` over the ranks, in place, and average running statistics.

    If each rank's loss is the sum over its share divided by the size of the whole batch, the
    gradients become the whole batch's. Running statistics (of batch norm) are every persistent
    buffer of floats in a module in training mode: they change linearly, so their mean is what the
    ranks saw together. Those of a frozen module stay as they are, to the bit.
    """
    if count() == 1:
        return
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        if weight.grad is None:  # this rank's share was empty
            weight.grad = torch.zeros_like(weight)
    statistics = [
        tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if is_statistic(tensor) and model.get_submodule(name.rpartition(".")[0]).training
    ]
    for statistic in statistics:
        statistic /= count()
    add_up([*(w.grad for w in weights if w.grad is not None), *sums, *statistics])


def is_statistic(tensor: Tensor) -> bool:
    """Tell running statistics from weights and counters."""
    return not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def add_up(tensors: list[Tensor]) -> None:
    """Replace tensors, all on one device, by their sums over the ranks: one message, float32."""
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    with communicating():
        dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view(tensor.shape))


def copy_from_leader(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the leader's."""
    if count() == 1:
        return
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        with communicating():
            dist.broadcast(whole, src=0)
        tensor.detach().copy_(whole)


def join_rows(part: Tensor | None) -> Tensor:
    """Return the rows of all ranks, in order, on every rank; None stands for no row."""
    return torch.cat([rows for rows in gather(part) if rows is not None])


def gather(value: T) -> list[T]:
    """Return every rank's value, on every rank."""
    values = [value] * count()
    if count() > 1:
        with communicating():
            dist.all_gather_object(values, value)
    return values


def highest(number: int) -> int:
    """Return the highest of the ranks' numbers."""
    if count() == 1:
        return number
    tensor = torch.tensor(number)
    with communicating():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def on_leader(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the leader; every rank returns what it returned, or raises its error."""
    if count() == 1:
        return function(*args, **kwargs)
    outcome: list[T | VitrailError | SystemExit | None] = [None]
    if is_leader():
        try:
            outcome = [function(*args, **kwargs)]
        except (VitrailError, SystemExit) as error:
            outcome = [error]
    with communicating():
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], VitrailError | SystemExit):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def each(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function, which does not talk to other ranks, on every one; if one fails, all do."""
    if count() == 1:
        return function(*args, **kwargs)
    error: VitrailError | None = None
    try:
        value = function(*args, **kwargs)
    except VitrailError as caught:
        error = caught
    errors = gather(error)
    if errors[0] is not None:
        raise errors[0]
    for number, error in enumerate(errors):
        if error is not None:
            raise type(error)(f"process {number}: {error}")
    return value


def first_on_machine(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the first rank of every machine, then on the others.

    So that what the first one downloads is found by the others.
    """
    first = local_rank() == 0
    value = each(lambda: function(*args, **kwargs) if first else None)
    return each(lambda: value if first else function(*args, **kwargs))  # type: ignore[return-value]
