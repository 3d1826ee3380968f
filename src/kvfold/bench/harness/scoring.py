"""What a folded past says about the text that follows it: log-probabilities, and greedy continuations.

All of a context but its last token is read and folded; the last token is fed with the continuation, so that every
scored token, the first one too, is predicted from what was kept. A continuation longer than a stride goes on folding
after each stride, as decoding does. Contexts that several continuations share are folded once. It knows no tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.bench.ask.asking import PIECE, group_by_length, has_sliding_layers, stop_tokens
from kvfold.bench.ask.cost import pace_fields, size_fields
from kvfold.bench.ask.reader import Reader, open_rows
from kvfold.bench.subject import Subject

FIRST_TOKENS = 32  # of a greedy continuation before its end is looked for; then four times as many, and so on


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A context, never empty, and the tokens after it that are scored."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """How likely a continuation is, and whether greedy decoding would have said it."""

    log_probability: float
    greedy: bool


@dataclass
class Costs:
    """What caches held and how long answers took, over everything that was asked. It changes with every batch."""

    _each: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def add(self, count: int, cost: dict[str, Any]) -> None:
        """One batch of so many requests."""
        self._each.append((count, cost))

    def mean(self) -> dict[str, Any]:
        """The fields of an Outcome, over all requests. Fractions are of the bytes of all."""
        every = sum(count for count, _ in self._each)
        names = [name for name, value in self._each[0][1].items() if value is not None]
        mean = {name: sum(count * cost[name] for count, cost in self._each) / every for name in names}
        if mean["full_bytes"]:
            mean |= {name: mean[f"{name}_bytes"] / mean["full_bytes"] for name in ("stored", "resident")}
        return mean


class Scorer:
    """A model under a plan. It changes: `costs` grows with what is asked."""

    def __init__(self, subject: Subject, plan: str, *, rows: int, stride: int) -> None:
        """`rows` contexts side by side at most; a continuation is scored in pieces of `stride` tokens."""
        self.subject, self.plan = subject, plan
        self.rows, self.stride = rows, stride
        self.alone = has_sliding_layers(subject)
        self.costs = Costs()

    def likelihoods(self, passages: Sequence[Passage]) -> list[Likelihood]:
        """One for each passage, in order."""
        found: dict[int, Likelihood] = {}
        shared: dict[tuple[int, ...], list[int]] = {}
        long: list[int] = []
        for i, passage in enumerate(passages):
            if len(passage.continuation) > self.stride:
                long.append(i)
            else:
                shared.setdefault(passage.context, []).append(i)
        for contexts in self._batches(list(shared), len):
            found |= self._short(passages, [shared[context] for context in contexts])
        for some in self._batches(long, lambda i: len(passages[i].context) + len(passages[i].continuation)):
            found |= self._long(passages, some)
        return [found[i] for i in range(len(passages))]

    def continuations(
        self, contexts: Sequence[tuple[int, ...]], *, tokens: int, ended: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """Greedy continuations of at most so many tokens; `ended` says that one need not go on."""
        found: dict[int, list[int]] = {}
        for some in self._batches(list(range(len(contexts))), lambda i: len(contexts[i])):
            answers = self._continue([contexts[i] for i in some], tokens, ended)
            found |= zip(some, answers, strict=True)
        return [found[i] for i in range(len(contexts))]

    def _batches(self, things: list[Any], length: Callable[[Any], int]) -> Iterator[list[Any]]:
        """What goes together: rows of like length, not more than fit."""
        for group in group_by_length([length(thing) for thing in things], alone=self.alone):
            for start in range(0, len(group), self.rows):
                yield [things[i] for i in group[start : start + self.rows]]

    def _folded(self, contexts: Sequence[Sequence[int]]) -> Reader:
        """Rows that have read all of these contexts but their last tokens, folded once."""
        rows = open_rows(self.subject, self.plan, count=len(contexts))
        for start in range(0, max(map(len, contexts)) - 1, PIECE):
            rows.feed([context[:-1][start : start + PIECE] for context in contexts])
        if any(rows.fed_tokens):
            rows.fold()
        return rows

    def _short(self, passages: Sequence[Passage], groups: Sequence[Sequence[int]]) -> dict[int, Likelihood]:
        """Continuations of one stride at most: each row has one context and, one after the other, its continuations."""
        rows = self._folded([passages[group[0]].context for group in groups])
        cost, found = size_fields(rows.ledger(), rows=len(groups)), {}
        for turn in range(max(map(len, groups))):
            asked = [(row, group[turn]) for row, group in enumerate(groups) if turn < len(group)]
            chunks: list[tuple[int, ...]] = [() for _ in groups]
            for row, i in asked:
                chunks[row] = _read_for(passages[i])
            begun = perf_counter()
            logits = rows.trial(chunks)
            self.costs.add(len(asked), cost | {"ttft_seconds": perf_counter() - begun, "tpot_seconds": 0.0})
            for row, i in asked:
                found[i] = _likelihood([_compared(logits[row], passages[i].continuation)])
        return found

    def _long(self, passages: Sequence[Passage], some: Sequence[int]) -> dict[int, Likelihood]:
        """Continuations of several strides, each on a row of its own, folded after each stride."""
        rows = self._folded([passages[i].context for i in some])
        scored: list[list[tuple[float, bool]]] = [[] for _ in some]
        begun = perf_counter()
        for start in range(0, max(len(passages[i].continuation) for i in some), self.stride):
            piece = slice(start, start + self.stride)
            logits = rows.read([_read_for(passages[i])[piece] for i in some])
            for row, i in enumerate(some):
                scored[row].append(_compared(logits[row], passages[i].continuation[piece]))
            rows.fold()
        cost = size_fields(rows.ledger(), rows=len(some))
        self.costs.add(len(some), cost | {"ttft_seconds": perf_counter() - begun, "tpot_seconds": 0.0})
        return {i: _likelihood(each) for i, each in zip(some, scored, strict=True)}

    def _continue(
        self, contexts: Sequence[tuple[int, ...]], tokens: int, ended: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        rows = self._folded(contexts)
        cost = size_fields(rows.ledger(), rows=len(contexts))
        size = min(FIRST_TOKENS, tokens)
        while True:
            answers = rows.answer([c[-1:] for c in contexts], max_new_tokens=size, stop=stop_tokens(self.subject))
            if size == tokens or all(len(answer) < size or ended(answer) for answer in answers):
                break
            size = min(4 * size, tokens)
        self.costs.add(len(contexts), cost | pace_fields(rows.pace))
        return answers


def _read_for(passage: Passage) -> tuple[int, ...]:
    """What is read so that each token of the continuation is predicted once."""
    return (*passage.context[-1:], *passage.continuation[:-1])


def _compared(logits: Float[Tensor, "Q vocabulary"], tokens: Sequence[int]) -> tuple[float, bool]:
    """The log-probability of the tokens that came, and whether each was the likeliest."""
    if not tokens:
        return 0.0, True
    came = torch.tensor(list(tokens), device=logits.device)[:, None]
    likely = logits.float().log_softmax(dim=-1)
    return float(likely.gather(1, came).sum()), bool((likely.argmax(dim=-1, keepdim=True) == came).all())


def _likelihood(pieces: Sequence[tuple[float, bool]]) -> Likelihood:
    return Likelihood(log_probability=sum(p for p, _ in pieces), greedy=all(greedy for _, greedy in pieces))
