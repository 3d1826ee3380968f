"""One chat completion from any endpoint that speaks OpenAI's form of it, with a time limit and patience.

What may pass is tried again after a growing pause: no connection, silence, an overloaded server, an answer of the
wrong shape. What will not pass (a wrong key, an unknown model, a redirect) is said at once. An answer is bounded in
time and size. The key is read from the environment when it is needed, goes to the given address only, and stands in no
error, no file and no record. It knows nothing of scores.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kvfold.errors import SuiteError

if TYPE_CHECKING:
    import httpx2

KEY_NAME = "KVFOLD_JUDGE_KEY"  # the environment variable that holds the key; none is sent where it is not set
LONGEST_PAUSE_SECONDS = 60.0
PATH = "/chat/completions"

_PASSING = frozenset({408, 409, 425, 429})  # and all from 500 on
_SHOWN = 200  # characters of a server's answer in an error
_LONGEST_ANSWER = 1 << 22  # bytes
_DRIPS = 3  # times the limit of silence: a whole answer takes no longer

Message = Mapping[str, str]
Read = TypeVar("Read")


class _Retry(Exception):
    """A failure that may pass: why, and the pause that the server wants before the next try."""

    def __init__(self, why: str, pause_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.pause_seconds = pause_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model answers, and how often and how long it is tried."""

    url: str  # up to and with the version, like http://localhost:8000/v1
    model: str
    limit_seconds: float = 60.0  # of silence, on one try
    tries: int = 4
    pause_seconds: float = 1.0  # before the second try; doubled before each further one

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise SuiteError(
                f"judge {self.url[:_SHOWN]!r} was given; it is no web address; give one like http://localhost:8000/v1"
            )
        if self.tries < 1 or self.limit_seconds <= 0 or self.pause_seconds < 0:
            raise SuiteError(
                f"a judge with {self.tries} tries of {self.limit_seconds} seconds, {self.pause_seconds} apart, was "
                "asked for; nothing could come of it; give at least one try, some seconds, and a pause of 0 or more"
            )

    def ask(self, messages: Sequence[Message], read: Callable[[str], Read | None]) -> Read:
        """Read the model's answer by `read`; where that gives None, the prompt is sent again.

        Raises SuiteError, in one line, when the last try has failed.
        """
        why = ""
        for attempt in range(self.tries):
            try:
                text = self._once(messages)
                found = read(text)
                if found is not None:
                    return found
                raise _Retry(f"it answered {_short(text, _key())!r}, which holds no rating")
            except _Retry as reason:
                why = str(reason)
                if attempt + 1 < self.tries:
                    pause = max(self.pause_seconds * 2**attempt, reason.pause_seconds)
                    time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        key = _key()
        raise SuiteError(
            f"the judge {_short(self.model, key)} at {_short(self.url, key)} was asked {self.tries} times; {why}; "
            "finished judgements are kept: mend the judge and give the same command again"
        )

    def _once(self, messages: Sequence[Message]) -> str:
        import httpx2

        body = {"model": self.model, "messages": [dict(message) for message in messages], "temperature": 0}
        key = _key()
        try:
            # A redirect is an answer like any other: the key goes nowhere else.
            with (
                httpx2.Client(timeout=self.limit_seconds, follow_redirects=False) as client,
                client.stream("POST", self._address(), json=body, headers=_headers(key)) as answer,
            ):
                data = self._read(answer, time.monotonic() + _DRIPS * self.limit_seconds)
                if answer.status_code != 200:
                    raise self._refused(answer, data, key)
                return _content(data, key)
        except httpx2.TimeoutException:
            raise _Retry(f"it said nothing for {self.limit_seconds:g} seconds") from None
        except httpx2.ConnectError as error:
            raise _Retry(f"it could not be reached ({_short(str(error), key)})") from None
        except httpx2.TransportError as error:
            raise _Retry(f"the connection broke ({type(error).__name__})") from None
        except (httpx2.InvalidURL, ValueError, OSError) as error:
            raise SuiteError(
                f"the judge at {_short(self.url, key)} was to be asked; that is no address that can be "
                f"({_short(str(error), key)}); give one like http://localhost:8000/v1"
            ) from None

    def _read(self, answer: "httpx2.Response", until: float) -> bytes:
        """Read an answer as it comes. Raises _Retry for one that is too long, in bytes or in time."""
        data = bytearray()
        for piece in answer.iter_raw():
            data += piece
            if len(data) > _LONGEST_ANSWER:
                raise _Retry(f"its answer is longer than {_LONGEST_ANSWER} bytes")
            if time.monotonic() > until:
                raise _Retry(f"its answer was not whole after {_DRIPS * self.limit_seconds:g} seconds")
        return bytes(data)

    def _address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith(PATH) else base + PATH

    def _refused(self, answer: "httpx2.Response", data: bytes, key: str) -> Exception:
        """The error for an answer of another status than 200."""
        code = answer.status_code
        said = _short(data.decode("utf-8", errors="replace"), key)
        if code in _PASSING or code >= 500:
            return _Retry(f"it answered {code} {said!r}", _wanted_pause(answer))
        if 300 <= code < 400:
            place = _short(answer.headers.get("Location", "another place"), key)
            said = f"sends on to {place}, where no key is sent"
        return SuiteError(
            f"the judge {_short(self.model, key)} at {_short(self.url, key)} was asked; it refuses with {code} "
            f"{said!r}; give the address and name of a model that it serves, and its key in {KEY_NAME}; finished "
            "judgements are kept"
        )


def _key() -> str:
    key = os.environ.get(KEY_NAME, "").strip()
    if not key.isascii() or not (key.isprintable() and " " not in key):
        raise SuiteError(
            f"a key was given in {KEY_NAME}; it has spaces, line breaks or letters that no key has; give it as it is"
        )
    return key


def _headers(key: str) -> dict[str, str]:
    plain = {"Accept-Encoding": "identity"}  # what is packed could unpack to anything
    return plain | ({"Authorization": f"Bearer {key}"} if key else {})


def _content(data: bytes, key: str) -> str:
    """The text in an answer."""
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        said = _short(data.decode("utf-8", errors="replace"), key)
        raise _Retry(f"its answer {said!r} is no chat completion") from None
    if not isinstance(text, str):
        raise _Retry("its answer holds no text")
    return text


def _wanted_pause(answer: "httpx2.Response") -> float:
    try:
        return max(0.0, float(answer.headers.get("Retry-After", "0")))
    except ValueError:  # a date: rare, and our own pauses will do
        return 0.0


def _short(text: str, key: str) -> str:
    """Write a text in one line of bounded length, with the key masked wherever it stands."""
    words = " ".join((text.replace(key, "***") if key else text).split())
    return words if len(words) <= _SHOWN else words[:_SHOWN] + "..."
