"""Rows of a rival: the same few verbs as our own rows, carried out in the rival's process.

What is fed before the first question is one context, prefilled and compressed as a whole when something is asked of
it; that is the best a rival can do that compresses the first prefill only, and better than it would do in a chat.
What is fed later is appended, as the rival appends it. Rows are run one by one, so no pads reach it. Tokens go
over, never text. Sizes are those found by walking in its process; its claim is a field apart.
"""

import base64
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.bench.peers.plans import RivalPlan
from kvfold.bench.peers.process import Process
from kvfold.budget.ledger import Ledger
from kvfold.chat.rows import Pace
from kvfold.errors import DataError

SUMMED = ("seen", "slots", "stored_bytes", "resident_bytes", "other_bytes", "full_bytes")


class PeerRows:
    """Conversations under a rival. It changes with every feed; the process must serve one of these at a time."""

    def __init__(self, process: Process, plan: RivalPlan, *, rows: int) -> None:
        self.plan = plan
        self.fed_tokens = [0] * rows
        self.pace: Pace | None = None
        self._process = process
        self._contexts: list[list[int]] | None = [[] for _ in range(rows)]  # None once they are folded
        process.ask("forget")

    def feed(self, chunks: Sequence[Sequence[int]]) -> None:
        """Take one chunk of tokens a row; a row may have none."""
        self._count(chunks)
        if self._contexts is None:
            self._read(chunks, remember=True, newest=1)
            return
        for context, chunk in zip(self._contexts, chunks, strict=True):
            context += chunk

    def fold(self) -> None:
        """Do nothing yet: a rival folds its context when it has all of it."""

    def ledger(self) -> Ledger:
        """Sum what the rows hold, found by walking."""
        self._take()
        each = [self._held(self._process.ask("held", row=row)) for row in range(len(self.fed_tokens))]
        sums: Any = {name: sum(one[name] for one in each) for name in SUMMED}
        claims = [one["claimed"] for one in each if one["claimed"] is not None]
        return Ledger(
            plan=str(self.plan),
            fed=max(one["seen"] for one in each),
            layers=each[0]["layers"],
            kv_heads=each[0]["kv_heads"],
            slack_bytes=0,
            attended_slots=sums["slots"],  # masked entries are read like any other
            parts=(),
            claimed=sum(claims) / len(claims) if claims else None,
            **sums,
        )

    def answer(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Decode each row greedily after its prompt, stop token left out; afterwards all is as before.

        The pace is that of a row alone, the mean over rows.
        """
        self._take()
        replies = [
            self._process.ask("answer", row=row, ids=list(ids), max_new_tokens=max_new_tokens, stop=sorted(stop))
            for row, ids in enumerate(prompts)
        ]
        for reply in replies:
            tokens, steps = reply.get("tokens"), reply.get("steps")
            are_ids = isinstance(tokens, list) and all(type(token) is int for token in tokens)
            if not are_ids or type(steps) is not int:
                raise self._process.nonsense("answer", reply)
        first_seconds = sum(float(reply["first_seconds"]) for reply in replies)
        self.pace = Pace(
            first_seconds=first_seconds / len(replies),
            rest_seconds=sum(float(reply["rest_seconds"]) for reply in replies),
            steps=sum(reply["steps"] for reply in replies),
        )
        return [reply["tokens"] for reply in replies]

    def logits(self, chunks: Sequence[Sequence[int]]) -> Float[Tensor, "B vocabulary"]:
        """Read one chunk a row, none of them empty; the logits of each row's next token."""
        self._count(chunks)
        return torch.stack([each[-1] for each in self._read(chunks, remember=True, newest=1)])

    def read(self, chunks: Sequence[Sequence[int]]) -> list[Float[Tensor, "_ vocabulary"]]:
        """Read one chunk a row; for each row the logits after each of its tokens."""
        self._count(chunks)
        return self._read(chunks, remember=True, newest=0)

    def trial(self, chunks: Sequence[Sequence[int]], *, singly: int = 0) -> list[Float[Tensor, "_ vocabulary"]]:
        """Give the logits of `read`, all tokens at once, and put the rows back: no rival fetches anew for a token."""
        return self._read(chunks, remember=False, newest=0)

    def step_seconds(self, tokens: Sequence[int]) -> list[float]:
        """Read tokens into the only row, one by one; the seconds that each took in the rival's process."""
        assert len(self.fed_tokens) == 1, "steps are timed of one row"
        self._take()
        reply = self._process.ask("steps", row=0, ids=list(tokens))
        seconds = reply.get("seconds")
        if not isinstance(seconds, list) or [type(one) for one in seconds] != [float] * len(tokens):
            raise self._process.nonsense("steps", reply)
        self.fed_tokens[0] += len(tokens)
        return seconds

    def _take(self) -> None:
        """Hand the contexts over, if that has not been done."""
        if self._contexts is None:
            return
        empty = [row for row, context in enumerate(self._contexts) if not context]
        if empty:
            raise DataError(f"row {empty[0]} has no context; {self.plan} has nothing to compress; feed it some tokens")
        settings = dict(self.plan.settings)
        for row, ids in enumerate(self._contexts):
            self._held(self._process.ask("take", row=row, ids=ids, method=self.plan.method, settings=settings))
        self._contexts = None

    def _held(self, reply: dict[str, Any]) -> dict[str, Any]:
        numbers = (*SUMMED, "layers", "kv_heads")
        if any(type(reply.get(name)) is not int for name in numbers) or "claimed" not in reply:
            raise self._process.nonsense("held", reply)
        return reply

    def _read(self, chunks: Sequence[Sequence[int]], *, remember: bool, newest: int) -> list[Tensor]:
        self._take()
        return [
            self._logits(self._process.ask("read", row=row, ids=list(ids), remember=remember, newest=newest))
            if len(ids)
            else torch.zeros(0, 0)
            for row, ids in enumerate(chunks)
        ]

    def _logits(self, reply: dict[str, Any]) -> Tensor:
        try:
            data = bytearray(base64.b64decode(reply["logits"], validate=True))
            return torch.frombuffer(data, dtype=torch.float32).reshape(reply["shape"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise self._process.nonsense("read", reply) from None

    def _count(self, chunks: Sequence[Sequence[int]]) -> None:
        if len(chunks) != len(self.fed_tokens):
            raise DataError(
                f"{len(chunks)} chunks were given; there are {len(self.fed_tokens)} rows; give one for each"
            )
        self.fed_tokens = [fed + len(chunk) for fed, chunk in zip(self.fed_tokens, chunks, strict=True)]
