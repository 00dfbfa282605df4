"""``vitrail serve``."""

import socket
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vitrail.cli.console import print_out
from vitrail.cli.parsing import parse
from vitrail.errors import ConfigError, import_optional

CONNECTIONS = 512
"""More at once are answered with 503. The queues, which say when to retry, are shorter."""

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL ...]")]


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ServeOptions:
    """Serve predictions and maps over HTTP, with a web page to try models.

    For example:
      vitrail serve output/quick
    """

    models: Models = ()
    """Run folders, weights, bundled names or hf:OWNER/NAME. Default: the runs in output/ and the
    bundled models."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than 127.0.0.1 can be reached from the network, without a
    password."""
    port: int = 8000
    """Port to listen on; 0 for any free one."""
    no_browser: bool = False
    """Do not open the page in the browser."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto tries cuda, then mps, then cpu."""


def command(args: Sequence[str]) -> int:
    """Run ``vitrail serve`` until it is stopped."""
    options = parse(ServeOptions, args, prog="vitrail serve")
    import_optional("starlette")
    uvicorn = import_optional("uvicorn")
    from vitrail.serve.app import build_app
    from vitrail.serve.connections import Connection
    from vitrail.serve.models import Shelf

    shelf = Shelf(options.models, Path("output"), options.device)
    for name in shelf.names() if options.models else shelf.names()[:1]:
        shelf.get(name)
    listening = _listen(options.host, options.port)
    config = uvicorn.Config(
        build_app(shelf, options.host), http=Connection, ws="none", log_level="warning",
        access_log=False, server_header=False, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=30,
    )  # fmt: skip
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listening.getsockname()[1]}/"
    print_out(f"serving {', '.join(shelf.names())} at {address} (Ctrl-C stops it)")
    if not options.no_browser:
        webbrowser.open(address)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that a browser opened now waits for the server.

    Raises:
        ConfigError: the address cannot be used.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port is {port}: give a number from 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=1024)
        # Connections inherit it. asyncio sets it only for sockets that name their protocol; without
        # it every answer, sent in two parts, waits 40 ms for an acknowledgment of the first.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {reason}: give another --port or --host"
        ) from error
