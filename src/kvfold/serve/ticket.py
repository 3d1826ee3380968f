"""Ticket: one request on its way through the scheduler, and what comes back while it is answered.

The side that speaks HTTP makes a ticket and listens; the thread that runs the model reads it and tells what happens. A
client that goes away cancels its ticket. Plain values, no model.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvfold.data import Message
from kvfold.serve.refusal import Refusal
from kvfold.serve.sampling import Chance, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request asks for: the next message of a conversation, or how a prompt goes on."""

    owner: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None  # None: a conversation
    session: str | None = None  # a hash of the name that the client gave the conversation
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    longest: int | None = None  # of the reply; None: the server's limit
    wants_kept: bool = False  # whether the answer says what is kept of the text


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some text of the reply, with the chances of its tokens where these are wanted."""

    text: str
    chances: tuple[Chance, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of a reply, once it is folded and, where that is asked for, on disk."""

    reason: str  # stop or length
    prompt_tokens: int
    cached_tokens: int  # of the prompt, which were held and not read again
    reply_tokens: int
    folded: Mapping[str, Any]  # what the conversation takes now, and what is kept of it where that is wanted


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request that got no reply."""

    refusal: Refusal


Event = Piece | Ended | Failed


class Ticket:
    """A request and its listener. It changes: it may be cancelled."""

    def __init__(self, asked: Asked, tell: Callable[[Event], None]) -> None:
        """`tell` is called by the scheduler's thread."""
        self.asked = asked
        self.tell = tell
        self.made_seconds = time.monotonic()
        self._cancelled = threading.Event()
        self._closed = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody listens any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Say that nobody listens any more: the turn is undone."""
        self._cancelled.set()

    @property
    def is_closed(self) -> bool:
        """Whether the answer was handed to the network to its last byte, or nobody listens any more."""
        return self._closed.is_set()

    def close(self) -> None:
        """Say that the listener is done."""
        self._closed.set()

    @property
    def age_seconds(self) -> float:
        """How long ago the request came."""
        return time.monotonic() - self.made_seconds
