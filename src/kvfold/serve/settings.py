"""ServeSettings: the options of a server, with the limits of a request.

Bytes of memory are those of all chats together, the model's weights apart. Nothing of it can be changed by a request.
"""

from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import DataError
from kvfold.open import LEAST, PLAN

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Settings of one server. Raises DataError for an address that others reach without a token."""

    model: str  # the name that answers carry, and that requests give
    plan: str = PLAN
    least: int = LEAST  # tokens of a chat that a plan which evicts by a fraction leaves in any case
    memory_bytes: int = 2 << 30  # of all chats, weights apart
    store: Path | None = None  # where finished turns are written; None: only what memory has no room for, until the end
    is_shared: bool = False  # whether other servers write to the same store
    store_bytes: int = 10 << 30  # of files there; beyond, the chats used longest ago are removed
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: tuple[str, ...] = ()  # of clients; none: whoever reaches the address
    connections: int = 800  # at once; a request on one more gets 503
    rows: int = 16  # chats that decode at once
    queue: int = 64  # requests that wait; one more gets 429 with Retry-After
    wait_seconds: float = 60.0  # in the queue
    turn_seconds: float = 600.0  # of one reply; then it ends as a too long one does
    stall_seconds: float = 0.5  # a running reply waits at most about so long for prompts of others
    body_bytes: int = 8 << 20
    bodies_bytes: int = 128 << 20  # of all bodies that arrive at the moment; beyond, requests get 429
    body_seconds: float = 20.0  # for a body to arrive
    reply_tokens: int = 1024  # of a reply that names no limit, and the most that one may name
    kept_turns: int = 2  # states before the newest turns that stay in memory, for edited and regenerated turns

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.tokens:
            raise DataError(
                f"an address that others can reach was asked for ({self.host}); there is no token to know clients by; "
                "give --token-file, or stay on 127.0.0.1"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK


def bytes_from(text: str) -> int:
    """Read a size such as `512MB`, `2GB` or `1000000`. Raises DataError for anything else.

    >>> bytes_from("2GB")
    2000000000
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    plain = text.strip().upper()
    digits = plain.rstrip("BKMGI ")
    unit = plain[len(digits) :].strip()
    try:
        number = float(digits)
    except ValueError:
        number = 0.0
    if unit not in units or not 1 <= number * units.get(unit, 1) < 1 << 60:
        raise DataError(f"{text!r} was given as a size; it is no number of bytes; give one such as 512MB or 2GB")
    return int(number * units[unit])
