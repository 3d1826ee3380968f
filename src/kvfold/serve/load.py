"""Load: the same chats, so many at a time, sent to a server that speaks OpenAI's API, ours or another.

Each chat is a conversation of a few turns with a text of its own; a client begins its next chat when the last one is
over. Replies are greedy and streamed. What comes back is how soon a reply begins, tokens of replies in a second, what
the replies were, and the bytes that the process holds. `python -m kvfold.cli.load` prints it as a table.
"""

import concurrent.futures
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from kvfold.data import Message
from kvfold.errors import SuiteError

_TRIES = 200  # of a request that is sent away for now
_LIMIT_SECONDS = 900.0  # for one reply
NOTE = (
    "Note {number}: parcel {parcel} weighs {weight} kg, goes to dock {dock} and leaves before {hour} o'clock; "
    "the driver wants a signature, the customs paper and a photo of the seal. "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent, whoever answers."""

    url: str  # up to and with /v1
    model: str
    chats: int = 16
    turns: int = 2
    notes: int = 3  # of some 50 tokens each, in the first message of a chat
    tokens: int = 48  # of a reply, at most
    api_key: str = "none"

    def question(self, chat: int, turn: int) -> str:
        """Give what the client of a chat says in a turn."""
        if turn:
            return f"And what about parcel {100 * chat + turn}? Answer at length, and give your reasons."
        notes = [
            NOTE.format(number=i + 1, parcel=100 * chat + i, weight=chat + 3 * i, dock=(chat + i) % 9, hour=i % 12 + 1)
            for i in range(self.notes)
        ]
        return "".join(notes) + "What should I write down about these parcels? Answer at length."


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One reply."""

    text: str
    tokens: int
    first_seconds: float  # from the request to the first text
    cached_tokens: int
    sent_away: int  # times that the request was sent away for now


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What all chats came to, so many at a time."""

    clients: int
    seconds: float
    replies: tuple[tuple[Reply, ...], ...]  # of each chat, turn by turn
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def first_seconds(self) -> float:
        """The median time to the first text."""
        return statistics.median(reply.first_seconds for chat in self.replies for reply in chat)

    @property
    def tokens(self) -> int:
        """Tokens of all replies."""
        return sum(reply.tokens for chat in self.replies for reply in chat)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all replies by the time that all chats took, reading included."""
        return self.tokens / self.seconds

    @property
    def sent_away(self) -> int:
        """Times that a request had to be sent again."""
        return sum(reply.sent_away for chat in self.replies for reply in chat)

    def same(self, other: "Row") -> int:
        """Count the chats whose replies are, character by character, those of another row."""
        pairs = zip(self.replies, other.replies, strict=True)
        return sum([one.text for one in mine] == [one.text for one in theirs] for mine, theirs in pairs)


def send(load: Load, clients: int) -> Row:
    """Send all chats, so many at a time. Raises SuiteError where the server does not answer."""
    began = time.monotonic()
    with (
        httpx2.Client(timeout=_LIMIT_SECONDS, limits=httpx2.Limits(max_connections=None)) as http,
        concurrent.futures.ThreadPoolExecutor(clients) as pool,
    ):
        chats = [pool.submit(_talk, http, load, number) for number in range(load.chats)]
        replies = tuple(chat.result() for chat in chats)
        seconds = time.monotonic() - began
        memory = ledger(http, load)
    return Row(clients=clients, seconds=seconds, replies=replies, memory=memory)


def ledger(http: httpx2.Client, load: Load) -> dict[str, float]:
    """Read bytes and chats that the server says it holds; nothing of a server that has no such numbers."""
    headers = {"Authorization": f"Bearer {load.api_key}"}
    try:
        answer = http.get(f"{load.url.removesuffix('/v1')}/metrics", headers=headers)
    except httpx2.HTTPError:
        return {}
    lines = [line.rpartition(" ") for line in answer.text.splitlines() if line.startswith("kvfold_")]
    return {name.removeprefix("kvfold_"): float(value) for name, _, value in lines}


def resident_bytes(pid: int) -> tuple[int, int]:
    """Read the bytes that a process has in memory, now and at most so far. Raises SuiteError where that cannot be."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        truth = f"it cannot be read ({error.strerror})"
        raise SuiteError(f"the memory of process {pid} was asked for; {truth}; leave --pid away") from error
    sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    now, most = (int(sizes[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, most


def _talk(http: httpx2.Client, load: Load, number: int) -> tuple[Reply, ...]:
    """Hold one chat."""
    messages: list[Message] = []
    replies: list[Reply] = []
    for turn in range(load.turns):
        messages.append(Message(role="user", content=load.question(number, turn)))
        replies.append(_reply(http, load, messages))
        messages.append(Message(role="assistant", content=replies[-1].text))
    return tuple(replies)


def _reply(http: httpx2.Client, load: Load, messages: list[Message]) -> Reply:
    """Ask for one reply, again after a while where the server says so."""
    body: dict[str, Any] = {
        "model": load.model,
        "messages": [{"role": said.role, "content": said.content} for said in messages],
        "max_tokens": load.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {load.api_key}"}
    for tried in range(_TRIES):
        began = time.monotonic()
        try:
            with http.stream("POST", f"{load.url}/chat/completions", json=body, headers=headers) as answer:
                if answer.status_code == 200:
                    return _heard(answer.iter_lines(), began, tried)
                said = answer.read().decode(errors="replace")
        except httpx2.HTTPError as error:
            truth = f"it broke off ({error})"
            raise SuiteError(f"a reply was asked of {load.url}; {truth}; see whether the server runs") from error
        if answer.status_code != 429:
            break
        time.sleep(float(answer.headers.get("Retry-After", "1")))
    raise SuiteError(f"a reply was asked of {load.url}; it answered {answer.status_code}: {said[:200]}; see its log")


def _heard(lines: Iterator[str], began: float, tried: int) -> Reply:
    """Hear a stream to its end. Raises SuiteError where that does not come."""
    text, first, usage = "", None, None
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise SuiteError(f"a reply was listened to; the server said {event['error']}; see its log")
        usage = event.get("usage") or usage
        choices = event.get("choices") or [{}]
        piece = choices[0].get("delta", {}).get("content") or ""
        if piece and first is None:
            first = time.monotonic() - began
        text += piece
    if usage is None:
        raise SuiteError("a reply was listened to; it ended without its usage; see the log of the server")
    return Reply(
        text=text,
        tokens=usage["completion_tokens"],
        first_seconds=time.monotonic() - began if first is None else first,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        sent_away=tried,
    )
