"""Download of one file from the first of several mirrors that works, resuming partial files."""

import hashlib
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from vitrail.errors import DataError, OutputError

ANSWER_SECONDS, READ_SECONDS = 3.5, 20.0
"""Timeouts of a mirror's first answer, and of the next bytes."""
BLOCK = 1 << 20


def fetch(urls: Sequence[str], target: Path, *, md5: str) -> Path:
    """Download a file and check its MD5, resuming an earlier attempt.

    The bytes received so far are in ``target.part``; each mirror is asked for the rest.

    Raises:
        DataError: every mirror failed; the message lists them with the reasons.
        OutputError: it cannot be written.
    """
    partial = target.with_name(target.name + ".part")
    problems = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for url in urls:
            try:
                receive(url, partial)
            except requests.RequestException as error:
                problems.append(f"{url} ({_describe(error)})")
                continue
            if file_md5(partial) == md5:
                return partial.replace(target)
            partial.unlink()
            problems.append(f"{url} (wrong checksum)")
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    raise DataError(f"{target.name} could not be downloaded; tried {', '.join(problems)}")


def receive(url: str, partial: Path) -> None:
    """Append the missing bytes of the file at ``url`` to ``partial``."""
    have = partial.stat().st_size if partial.exists() else 0
    with _ask(url, start=have) as answer:
        if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
            return  # complete, or the checksum will differ
        answer.raise_for_status()
        resumed = answer.status_code == requests.codes.partial_content
        have = have if resumed else 0
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        with partial.open("ab" if resumed else "wb") as file, _progress_bar(url) as progress:
            task = progress.add_task(partial.stem, total=total, completed=have)
            for block in answer.iter_content(BLOCK):
                file.write(block)
                progress.advance(task, len(block))
    if total is not None and partial.stat().st_size < total:
        raise requests.exceptions.ChunkedEncodingError


def _ask(url: str, *, start: int) -> requests.Response:
    """Return a mirror's response to a request for the file from byte ``start`` on.

    An unresponsive name server, or several unresponsive addresses, can exceed the timeouts of
    requests: so the request runs in a thread, which is abandoned after ANSWER_SECONDS.

    Raises:
        requests.RequestException: there is no answer in time, or no connection.
    """
    answers: queue.SimpleQueue[requests.Response | requests.RequestException] = queue.SimpleQueue()
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})

    def get() -> None:
        timeout = (ANSWER_SECONDS, READ_SECONDS)
        try:
            answers.put(requests.get(url, headers=headers, stream=True, timeout=timeout))
        except requests.RequestException as error:
            answers.put(error)

    threading.Thread(target=get, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise requests.Timeout from None
    if isinstance(answer, requests.RequestException):
        raise answer
    return answer


def _progress_bar(url: str) -> Progress:
    """Return a progress bar on standard error; print one line instead if it is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"downloading {url}", markup=False, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def file_md5(path: Path) -> str:
    """Return a file's MD5."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _describe(error: requests.RequestException) -> str:
    """Return a short reason why a mirror failed."""
    if error.response is not None:
        return f"answered {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "cut off"
    return "no connection"
