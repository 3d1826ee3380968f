"""Scores of text that follows a folded past: log-probabilities, and greedy continuations.

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

Context = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodRequest:
    """A context, never empty, and the tokens after it that are scored."""

    context: Context
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens to read after the folded past, so that each token of the continuation is predicted once."""
        return (*self.context[-1:], *self.continuation[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """The log-probability of a continuation, and whether greedy decoding would have said it."""

    log_probability: float
    greedy: bool


@dataclass
class Costs:
    """The sizes of caches and the times of answers, over all requests. It changes with every batch."""

    _batches: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # how many requests, and their cost

    def add(self, count: int, cost: dict[str, Any]) -> None:
        """Count one batch of so many requests."""
        self._batches.append((count, cost))

    def mean(self) -> dict[str, Any]:
        """Average the fields of an Outcome over all requests. Fractions are of the bytes of all."""
        requests = sum(count for count, _ in self._batches)
        mean = {}
        for name, value in self._batches[0][1].items():
            if value is not None:
                mean[name] = sum(count * cost[name] for count, cost in self._batches) / requests
        if mean["full_bytes"]:
            for name in ("stored", "resident"):
                mean[name] = mean[f"{name}_bytes"] / mean["full_bytes"]
        return mean


class Scorer:
    """A model under a plan. It changes: `costs` grows with every request."""

    def __init__(self, subject: Subject, plan: str, *, rows: int, stride: int) -> None:
        """`rows` contexts side by side at most; a continuation is scored in pieces of `stride` tokens."""
        self.subject = subject
        self.plan = plan
        self.rows = rows
        self.stride = stride
        self.alone = has_sliding_layers(subject)
        self.costs = Costs()

    def likelihoods(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """Score every request, in order."""
        found: dict[int, Likelihood] = {}
        by_context: dict[Context, list[int]] = {}  # short requests, which can share a fold
        long: list[int] = []  # requests that fold on the way, each on a row of its own
        for number, request in enumerate(requests):
            if len(request.continuation) > self.stride:
                long.append(number)
            else:
                by_context.setdefault(request.context, []).append(number)
        shared = list(by_context.values())
        for batch in self._batches([len(context) for context in by_context]):
            found |= self._score_short(requests, [shared[i] for i in batch])
        for batch in self._batches([len(requests[i]) for i in long]):
            found |= self._score_long(requests, [long[i] for i in batch])
        return [found[number] for number in range(len(requests))]

    def continuations(
        self,
        contexts: Sequence[Context],
        *,
        tokens: int,
        ended: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        """Continue contexts greedily by at most so many tokens; `ended` says that an answer need not go on."""
        found: dict[int, list[int]] = {}
        for batch in self._batches([len(context) for context in contexts]):
            chosen = [contexts[i] for i in batch]
            answers = self._continue(chosen, tokens, ended)
            found |= zip(batch, answers, strict=True)
        return [found[i] for i in range(len(contexts))]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """The numbers of rows that go together: of like length, not more than fit."""
        for group in group_by_length(lengths, alone=self.alone):
            for start in range(0, len(group), self.rows):
                yield group[start : start + self.rows]

    def _folded(self, contexts: Sequence[Context]) -> Reader:
        """Rows that have read all of these contexts but their last tokens, folded once."""
        rows = open_rows(self.subject, self.plan, count=len(contexts))
        pasts = [context[:-1] for context in contexts]
        for start in range(0, max(len(past) for past in pasts), PIECE):
            rows.feed([past[start : start + PIECE] for past in pasts])
        if any(rows.fed_tokens):
            rows.fold()
        return rows

    def _score_short(
        self,
        requests: Sequence[LikelihoodRequest],
        groups: Sequence[Sequence[int]],
    ) -> dict[int, Likelihood]:
        """Score requests of one stride at most; each group shares a context, and so a row and its fold."""
        rows = self._folded([requests[group[0]].context for group in groups])
        sizes = size_fields(rows.ledger(), rows=len(groups))
        found = {}
        for turn in range(max(len(group) for group in groups)):
            # The continuation number `turn` of each row that has so many.
            current = {row: group[turn] for row, group in enumerate(groups) if turn < len(group)}
            chunks: list[tuple[int, ...]] = [() for _ in groups]
            for row, number in current.items():
                chunks[row] = requests[number].inputs
            begun = perf_counter()
            logits = rows.trial(chunks)
            self._add_cost(len(current), sizes, begun)
            for row, number in current.items():
                score = _score(logits[row], requests[number].continuation)
                found[number] = _likelihood([score])
        return found

    def _score_long(self, requests: Sequence[LikelihoodRequest], batch: Sequence[int]) -> dict[int, Likelihood]:
        """Score requests of several strides, a row for each, folded after each stride."""
        chosen = [requests[i] for i in batch]
        rows = self._folded([request.context for request in chosen])
        scored: list[list[tuple[float, bool]]] = [[] for _ in chosen]
        begun = perf_counter()
        longest = max(len(request.continuation) for request in chosen)
        for start in range(0, longest, self.stride):
            piece = slice(start, start + self.stride)
            logits = rows.read([request.inputs[piece] for request in chosen])
            for row, request in enumerate(chosen):
                scored[row].append(_score(logits[row], request.continuation[piece]))
            rows.fold()
        sizes = size_fields(rows.ledger(), rows=len(batch))
        self._add_cost(len(batch), sizes, begun)
        return {i: _likelihood(pieces) for i, pieces in zip(batch, scored, strict=True)}

    def _add_cost(self, count: int, sizes: dict[str, Any], begun: float) -> None:
        """Scoring decodes nothing: all of its time is that to the first token."""
        self.costs.add(count, sizes | {"ttft_seconds": perf_counter() - begun, "tpot_seconds": 0.0})

    def _continue(
        self,
        contexts: Sequence[Context],
        tokens: int,
        ended: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        rows = self._folded(contexts)
        sizes = size_fields(rows.ledger(), rows=len(contexts))
        prompts = [context[-1:] for context in contexts]
        size = min(FIRST_TOKENS, tokens)
        while True:
            answers = rows.answer(prompts, max_new_tokens=size, stop=stop_tokens(self.subject))
            if size == tokens or all(len(answer) < size or ended(answer) for answer in answers):
                break
            size = min(4 * size, tokens)
        self.costs.add(len(contexts), sizes | pace_fields(rows.pace))
        return answers


def _score(logits: Float[Tensor, "Q vocabulary"], tokens: Sequence[int]) -> tuple[float, bool]:
    """The log-probability of the tokens that came, and whether each was the likeliest."""
    if not tokens:
        return 0.0, True
    came = torch.tensor(list(tokens), device=logits.device)[:, None]  # Q 1, to gather by
    log_probabilities = logits.float().log_softmax(dim=-1)
    greedy = log_probabilities.argmax(dim=-1, keepdim=True) == came
    total = log_probabilities.gather(1, came).sum()
    return float(total), bool(greedy.all())


def _likelihood(pieces: Sequence[tuple[float, bool]]) -> Likelihood:
    return Likelihood(
        log_probability=sum(log_probability for log_probability, _ in pieces),
        greedy=all(greedy for _, greedy in pieces),
    )
