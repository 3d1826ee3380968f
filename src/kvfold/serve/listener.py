"""Listener: the asyncio side of a ticket. Events of the scheduler's thread arrive in the loop of the request.

A request whose client goes away cancels its ticket, whether its answer is streamed or not.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from starlette.requests import Request

from kvfold.serve.refusal import Refusal
from kvfold.serve.ticket import Asked, Ended, Event, Failed, Ticket

_LOOK_SECONDS = 0.25  # between looks at whether the client is still there


class Listener:
    """Hears the events of one ticket. It changes: it may be closed."""

    def __init__(self, asked: Asked, *, closed: Callable[[], None]) -> None:
        """`closed` is called when nothing more will be listened to."""
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._is_over = False
        self._looked_seconds = time.monotonic()
        self.ticket = Ticket(asked, self._tell)

    async def next(self, request: Request | None = None) -> Event:
        """Wait for the next event. Raises Refusal if the client of this request goes away meanwhile."""
        try:
            if request is None:  # of a stream, which is cancelled from outside
                return self._heard(await self._events.get())
            while True:
                if await self._has_gone(request):
                    raise Refusal(499, "the client went away")
                with contextlib.suppress(TimeoutError):
                    return self._heard(await asyncio.wait_for(self._events.get(), _LOOK_SECONDS))
        except BaseException:  # cancelled, too
            self.close()
            raise

    def close(self) -> None:
        """Cancel the ticket, unless it has ended; then its answer has been sent."""
        if not self._is_over:
            self.ticket.cancel()
        self.ticket.close()
        self._closed()

    async def _has_gone(self, request: Request) -> bool:
        """Look after the client, but not before every event: they come quickly."""
        now = time.monotonic()
        if now - self._looked_seconds < _LOOK_SECONDS:
            return False
        self._looked_seconds = now
        return await request.is_disconnected()

    def _heard(self, event: Event) -> Event:
        self._is_over = isinstance(event, Ended | Failed)
        return event

    def _tell(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
