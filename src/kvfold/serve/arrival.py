"""Arrival: the body of a request, read to its end within bounds of bytes and of time.

Bodies must be declared as JSON, which other sites' pages cannot do without asking first. What a body says is not read
here.
"""

import asyncio

from starlette.requests import ClientDisconnect, Request

from kvfold.serve.refusal import Refusal
from kvfold.serve.settings import ServeSettings
from kvfold.serve.waiting import later

JSON = "application/json"


class Arrival:
    """The bodies that arrive at one server at the moment. It changes with every chunk."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._arriving_bytes = 0  # of all bodies that are not read to their end

    async def read(self, request: Request) -> bytes:
        """Read a body. Raises Refusal for one that is too long or too slow, or that is no JSON by its header."""
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise Refusal(415, f"a body of type {kind or 'none'} was sent; send Content-Type: {JSON}")
        raw = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                async for chunk in request.stream():
                    raw += chunk
                    self._arriving_bytes += len(chunk)
                    self._refuse_more(len(raw))
        except ClientDisconnect:
            raise Refusal(499, "the client went away") from None
        except TimeoutError:
            seconds = self._settings.body_seconds
            raise Refusal(408, f"a body did not arrive within {seconds:.0f} seconds; send it again") from None
        finally:
            self._arriving_bytes -= len(raw)
        return bytes(raw)

    def _refuse_more(self, size: int) -> None:
        """Raise Refusal where a body, or all that arrive together, have become too long."""
        limit = self._settings.body_bytes
        if size > limit:
            raise Refusal(413, f"a body of more than {limit} bytes was sent; send less")
        if self._arriving_bytes > self._settings.bodies_bytes:
            raise later("more bodies arrive at the moment than there is room for")
