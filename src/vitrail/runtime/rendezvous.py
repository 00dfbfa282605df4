"""Meeting the processes that torchrun started, losing them, and what outlives a restart of them."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from vitrail.errors import TrainingError

MEETING_SECONDS = 600.0
"""How long a rank waits for the others to start."""
ANSWER_SECONDS = 5.0
"""How long it waits for a leader that may be dead."""


def meet(backend: str) -> None:
    """Join the other processes; the environment tells which this one is.

    Raises:
        TrainingError: they cannot be reached.
    """
    with communicating():
        job = job_store()
        if job is None:
            dist.init_process_group(backend)
        else:
            number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = meeting_store(job, number)
            dist.init_process_group(backend, store=store, rank=number, world_size=size)


@contextmanager
def communicating() -> Iterator[None]:
    """Tell in our words that another rank does not answer."""
    try:
        yield
    except RuntimeError as error:  # gloo's and the store's, of many wordings
        reason = str(error).partition("] ")[2].partition(". ")[0] or str(error)
        raise TrainingError(
            f"process {os.environ.get('RANK', '0')} lost another one ({reason:.100}): it was "
            "killed, or failed with an error of its own. The last checkpoint stands: go on with "
            "--resume RUN_FOLDER, or let torchrun do so with --max-restarts"
        ) from error


def remember(key: str, value: str) -> None:
    """Keep a word for as long as this job of torchrun lives, also when it restarts its ranks."""
    store = job_store()
    if store is not None:
        store.set(key, value)


def recall(key: str) -> str | None:
    """Return what remember() was given in this job, if anything."""
    store = job_store()
    if store is None or not store.check([key]):
        return None
    return str(store.get(key).decode())


def job_store() -> Any:
    """Return the store that torchrun itself holds, or none without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with communicating():
        return PrefixStore("vitrail", TCPStore(host, port, is_master=False))


def meeting_store(job: Any, number: int) -> Any:
    """Return a new store for this life of the ranks, held by the leader.

    torchrun's own store outlives a restart, and so do the addresses in it of ranks that are dead:
    who reads them before they are renewed waits for the dead. Nobody answers at a dead leader's
    port, so here the others ask again until the living one does.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host = os.environ["MASTER_ADDR"]
    if number == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        job.set("leader", str(store.port))
        return store
    until = time.monotonic() + MEETING_SECONDS
    while True:
        address = host, int(job.get("leader"))
        try:
            socket.create_connection(address, ANSWER_SECONDS).close()
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(f"nobody answers at {host}:{address[1]}") from error
            time.sleep(0.1)
        else:
            return TCPStore(*address, is_master=False)
