"""Connections, each closed if it sends no request in time."""

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol

SECONDS_TO_ASK = 20.0
"""Time limit for the header of a request; security.SECONDS_TO_SEND is for its body."""


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closed if no complete header arrives in time, after opening and after each response.

    uvicorn itself waits forever for the rest of a header, and for the first one.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        if self._late:
            self._late.cancel()

    def _wait(self) -> None:
        if self._late:
            self._late.cancel()
        self._late = self.loop.call_later(SECONDS_TO_ASK, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
