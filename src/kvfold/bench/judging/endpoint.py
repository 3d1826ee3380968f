"""One chat completion from any endpoint that speaks OpenAI's form of it, with a time limit and patience.

What may pass is tried again after a growing pause: no connection, silence, an overloaded server, an answer of the
wrong shape. What will not pass (a wrong key, an unknown model) is said at once. The key is read from the environment
when it is needed, and stands in no error, no file and no record. It knows nothing of scores.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import TypeVar

from kvfold.errors import SuiteError

KEY_NAME = "KVFOLD_JUDGE_KEY"  # the environment variable that holds the key; none is sent where it is not set
LONGEST_PAUSE_SECONDS = 60.0
PATH = "/chat/completions"

_PASSING = frozenset({408, 409, 425, 429})  # and all from 500 on
_SHOWN = 200  # characters of a server's answer in an error

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
                f"judge {self.url!r} was given; it is no web address; give one like http://localhost:8000/v1"
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
                raise _Retry(f"it answered {_short(text)!r}, which holds no rating")
            except _Retry as reason:
                why = str(reason)
                if attempt + 1 < self.tries:
                    pause = max(self.pause_seconds * 2**attempt, reason.pause_seconds)
                    time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        raise SuiteError(
            f"the judge {self.model} at {self.url} was asked {self.tries} times; {why}; finished judgements are kept: "
            "mend the judge and give the same command again"
        )

    def _once(self, messages: Sequence[Message]) -> str:
        body = {"model": self.model, "messages": [dict(message) for message in messages], "temperature": 0}
        request = urllib.request.Request(self._address(), data=json.dumps(body).encode(), headers=_headers())
        try:
            with urllib.request.urlopen(request, timeout=self.limit_seconds) as answer:
                return _content(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except TimeoutError:
            raise _Retry(f"it said nothing for {self.limit_seconds:g} seconds") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Retry(f"it said nothing for {self.limit_seconds:g} seconds") from None
            raise _Retry(f"it could not be reached ({error.reason})") from None
        except (OSError, HTTPException) as error:
            raise _Retry(f"the connection broke ({type(error).__name__})") from None

    def _address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith(PATH) else base + PATH

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """The error for an answer of another status than 200."""
        try:
            said = _short(error.read().decode("utf-8", errors="replace"))
        except (OSError, HTTPException):
            said = ""
        if error.code in _PASSING or error.code >= 500:
            return _Retry(f"it answered {error.code} {said!r}", _wanted_pause(error))
        return SuiteError(
            f"the judge {self.model} at {self.url} was asked; it refuses with {error.code} {said!r}; give the address "
            f"and name of a model that it serves, and its key in {KEY_NAME}; finished judgements are kept"
        )


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY_NAME, "").strip()
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _content(data: bytes) -> str:
    """The text in an answer."""
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        said = _short(data.decode("utf-8", errors="replace"))
        raise _Retry(f"its answer {said!r} is no chat completion") from None
    if not isinstance(text, str):
        raise _Retry("its answer holds no text")
    return text


def _wanted_pause(error: urllib.error.HTTPError) -> float:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "0")))
    except ValueError:  # a date: rare, and our own pauses will do
        return 0.0


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN else words[:_SHOWN] + "..."
