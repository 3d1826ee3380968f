"""Metrics of a server in the form that Prometheus reads: requests, tokens, bytes, folds, times.

Numbers only: no text, no names of clients or conversations. Each server has a registry of its own.
"""

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvfold.serve.shelf import Shelf

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server. They change with every step."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._make(Counter, "requests", "Requests that ended, by how.", labelnames=["end"])
        self._prompt = self._make(Counter, "prompt_tokens", "Tokens of prompts that were read.")
        self._cached = self._make(Counter, "cached_tokens", "Tokens of prompts that were held and not read again.")
        self._reply = self._make(Counter, "reply_tokens", "Tokens of finished replies.")
        self._folds = self._make(Counter, "folds", "Turns that were folded.")
        self._to_disk = self._make(Gauge, "moved_to_disk", "Chats that have left memory for the disk so far.")
        self._held = self._make(Gauge, "held_bytes", "Bytes that chats hold in memory.")
        self._promised = self._make(Gauge, "promised_bytes", "Bytes that running turns may come to need.")
        self._limit = self._make(Gauge, "limit_bytes", "Bytes that all chats may take.")
        self._full = self._make(Gauge, "full_bytes", "Bytes that the chats in memory would take unfolded.")
        self._chats = self._make(Gauge, "chats", "Chats, by where they are.", labelnames=["where"])
        self._queue = self._make(Gauge, "waiting_requests", "Requests that wait.")
        self._running = self._make(Gauge, "running_requests", "Requests that run.")
        self._first = self._make(Histogram, "first_token_seconds", "From request to first token.", buckets=_SECONDS)
        self._step = self._make(Histogram, "token_seconds", "From one token of a reply to the next.", buckets=_SECONDS)

    def text(self) -> bytes:
        """Give all of them as text."""
        return generate_latest(self._registry)

    def read(self, tokens: int) -> None:
        """Count tokens of a prompt."""
        self._prompt.inc(tokens)

    def first(self, seconds: float) -> None:
        """Note how long the first token of a reply took."""
        self._first.observe(seconds)

    def decoded(self, rows: int, seconds: float) -> None:
        """Note a decoding step, which took the same time for each of its rows."""
        for _ in range(rows):
            self._step.observe(seconds)

    def ended(self, end: str, *, tokens: int = 0, cached: int = 0) -> None:
        """Count the end of a request."""
        self._requests.labels(end=end).inc()
        self._reply.inc(tokens)
        self._cached.inc(cached)
        self._folds.inc(1 if tokens else 0)

    def show(self, shelf: Shelf, load: tuple[int, int]) -> None:
        """Renew what is true at the moment."""
        waiting, running = load
        self._queue.set(waiting)
        self._running.set(running)
        self._held.set(shelf.holdings.held_bytes)
        self._promised.set(shelf.holdings.promised_bytes)
        self._limit.set(shelf.holdings.limit_bytes)
        self._to_disk.set(shelf.moved_to_disk)

    def show_chats(self, shelf: Shelf) -> None:
        """Renew the numbers of chats, which change once a turn."""
        inside, outside = shelf.counts
        self._chats.labels(where="memory").set(inside)
        self._chats.labels(where="disk").set(outside)
        self._full.set(shelf.full_bytes)

    def _make(self, kind: Any, name: str, meaning: str, **settings: Any) -> Any:
        return kind(f"kvfold_{name}", meaning, registry=self._registry, **settings)


def summed(texts: Sequence[str]) -> str:
    """Add up the numbers of several servers, each as text."""
    families: dict[str, dict[str, float]] = {}  # by the lines that introduce them
    for text in texts:
        samples: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("#"):
                samples = families.setdefault(line, {})
                continue
            name, _, value = line.rpartition(" ")
            before = samples.get(name)
            if before is None:
                samples[name] = float(value)
            elif "_created" in name:  # a time: since the oldest one
                samples[name] = min(before, float(value))
            else:
                samples[name] = before + float(value)
    lines = [[head, *(f"{name} {value}" for name, value in samples.items())] for head, samples in families.items()]
    return "".join(f"{line}\n" for family in lines for line in family)
