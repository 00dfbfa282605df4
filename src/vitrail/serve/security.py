"""What every request must pass, and what every answer carries: hosts, origins, sizes, headers."""

import asyncio
import ipaddress
import re
import socket

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrail.serve.batching import BusyError

MOST_BYTES = 16 * 2**20
"""Maximum size of a picture file."""
MOST_BYTES_TOGETHER = 256 * 2**20
"""Maximum total size of the files that are being received at once."""
SECONDS_TO_SEND = 20.0
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""No inline script, no other host, no frame."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")


class Guard:
    """Refuses requests for other hosts and from other sites' pages; adds HEADERS to answers.

    A page of another site can make a browser send requests to this machine, even under a name of
    its own that resolves to this address (DNS rebinding): the Host and Origin headers reveal it.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._any_address = host in ("0.0.0.0", "::")
        names = {socket.gethostname().lower()} if self._any_address else set()
        self._hosts = names | {"127.0.0.1", "localhost", "[::1]", host.lower(), f"[{host}]"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        problem = self._problem(Headers(scope=scope))
        app = JSONResponse({"error": problem}, 403) if problem else self._app
        await app(scope, receive, send_with_headers)

    def _problem(self, headers: Headers) -> str:
        """Return why a request is refused; empty if it is not."""
        hosts = headers.getlist("host")
        match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or not self._is_ours(match[1].lower()):
            return "the Host header does not name this server: open the address that it printed"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != hosts[0].lower():
            return "requests from pages of other sites are refused"
        return ""

    def _is_ours(self, host: str) -> bool:
        if host in self._hosts or not self._any_address:
            return host in self._hosts
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True


class RefusedError(Exception):
    """A request that is answered with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Bodies:
    """Reads the bodies of requests, within limits of size, time and memory."""

    def __init__(self) -> None:
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """Return the body.

        Raises:
            RefusedError: it is empty, too large or too slow.
            BusyError: too many bytes are being received by all requests together.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > MOST_BYTES:
            raise _too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                async for part in request.stream():
                    size += len(part)
                    self._held += len(part)
                    parts.append(part)
                    if size > MOST_BYTES:
                        raise _too_large()
                    if self._held > MOST_BYTES_TOGETHER:
                        raise BusyError("too many requests at once: try again in a second")
        except TimeoutError:
            raise RefusedError(408, "the picture was sent too slowly") from None
        finally:
            self._held -= size
        if not size:
            raise RefusedError(400, "the body is empty: send the bytes of a picture file")
        return b"".join(parts)


def _too_large() -> RefusedError:
    return RefusedError(413, f"the picture file is larger than {MOST_BYTES // 2**20} MiB")
