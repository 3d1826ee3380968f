"""Rows: many scripted conversations side by side on one cache, for benchmarks.

Rows share columns: a chunk is as wide as its longest row. The columns that a shorter row does not fill are pads, which
are never counted and never kept. Each row has its positions and its mask, so it reads what it would read alone. The
cache folds only when `fold` is called. This file knows token ids, but no texts, templates or scores.
"""

import copy
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budget.ledger import Ledger
from kvfold.errors import CacheError, DataError, ModelError
from kvfold.hf.argument import given
from kvfold.hf.binding import ModelBinding
from kvfold.hf.cache import FoldedCache
from kvfold.hf.generation import Model, stock_cache
from kvfold.hf.stock_layers import reads_pads
from kvfold.memory.forward import Boundaries
from kvfold.open import SINKS, cache_with, fork_under
from kvfold.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The time that an answer took, over all rows together."""

    first_seconds: float  # from the question to the first token
    rest_seconds: float  # for all further tokens
    steps: int  # forwards after the first

    @property
    def token_seconds(self) -> float | None:
        """The mean time of a further token; None if there was none."""
        return self.rest_seconds / self.steps if self.steps else None


class Rows:
    """Conversations side by side. It changes with every feed and fold.

    >>> rows = Rows(model, "snapkv(keep=0.2)", rows=2)
    >>> rows.feed([first_turn, other_first_turn])
    >>> rows.fold()
    >>> rows.answer([question, other_question], max_new_tokens=16, stop={end})
    """

    def __init__(
        self,
        model: Model,
        plan: Plan | str | None,
        *,
        rows: int,
        pinned: int = SINKS,
        pad: int = 0,
        for_plans: Sequence[Plan] = (),
    ) -> None:
        """Make a cache for `rows` conversations, folded by `plan`; None is the stock cache, which never folds.

        `pad` is the token in the columns that a row does not fill, `for_plans` those that `under` will be called with.
        Raises PlanError, BudgetError, ModelError.
        """
        self.model = model
        self.pad = pad
        self.folded: FoldedCache | None = None
        if plan is not None:
            # No prompt: nothing folds by itself, neither in the middle of a turn nor in an answer.
            boundaries = Boundaries(prompt=0)
            self.folded = cache_with(model, plan, boundaries=boundaries, pinned=pinned, least=0, for_plans=for_plans)
        self.cache = stock_cache(model) if self.folded is None else self.folded
        self.mask = torch.zeros(rows, 0, dtype=torch.bool, device=model.device)
        self.fed_tokens = [0] * rows  # real tokens that each row has read; answers are not counted
        self.pace: Pace | None = None  # of the newest answer
        self._position_limit = ModelBinding.of(model).position_limit

    def feed(self, chunks: Sequence[Sequence[int]]) -> None:
        """Read one chunk of tokens for each row. A chunk may be empty."""
        self._refuse_too_long([len(chunk) for chunk in chunks])
        if any(len(chunk) for chunk in chunks):
            columns, valid = self._columns(chunks, left=False)
            self._read(columns, valid)
            self._count(chunks)

    def read(self, chunks: Sequence[Sequence[int]]) -> list[Float[Tensor, "_ vocabulary"]]:
        """Read one chunk for each row. Return its logits after each of its tokens.

        A chunk may be empty, but not all of them. The caller bounds the memory by the width of the chunks.
        """
        if not any(len(chunk) for chunk in chunks):
            raise DataError("chunks without a token were given; nothing follows from nothing; give one to some row")
        self._refuse_too_long([len(chunk) for chunk in chunks])
        columns, valid = self._columns(chunks, left=False)
        logits = self._forward(columns, valid, newest=0)
        self._count(chunks)
        return [logits[row, : len(chunk)] for row, chunk in enumerate(chunks)]

    def logits(self, chunks: Sequence[Sequence[int]]) -> Float[Tensor, "B vocabulary"]:
        """Read one chunk for each row, none of them empty. Return the logits after the last token of each."""
        self._refuse_empty(chunks)
        self._refuse_too_long([len(chunk) for chunk in chunks])
        columns, valid = self._columns(chunks, left=True)
        logits = self._read(columns, valid)
        self._count(chunks)
        return logits

    def fold(self) -> None:
        """Fold all real tokens that are still raw."""
        if self.folded is not None:
            has_pads = not bool(self.mask.all())
            self.folded.fold(self.mask if has_pads else None)

    def answer(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Continue each row greedily after its prompt. The stop token is left out.

        The rows are afterwards as they were, so one history can be asked many questions.
        """
        self._refuse_empty(prompts)
        self._refuse_too_long([len(prompt) + max_new_tokens - 1 for prompt in prompts])
        mask, stock = self.mask, self.cache
        before = None if self.folded is None else self.folded.mark()
        if self.folded is None:  # the stock cache has no way back, so a copy of it answers
            self.cache = copy.deepcopy(stock)
        try:
            return self._continue(prompts, max_new_tokens, frozenset(stop))
        finally:
            self.mask, self.cache = mask, stock
            if self.folded is not None and before is not None:
                self.folded.restore(before)

    def under(self, plan: Plan | str) -> "Rows":
        """Fork the rows before their first fold, to go on by another plan. Raises as `fork_under` does."""
        assert self.folded is not None, "a stock cache folds by no plan"
        twin = copy.copy(self)  # masks and counts are values
        twin.folded = twin.cache = fork_under(self.folded, plan)
        twin.pace = None
        return twin

    def ledger(self) -> Ledger | None:
        """Count what the rows hold together; None for the stock cache."""
        return None if self.folded is None else self.folded.ledger()

    def _continue(self, prompts: Sequence[Sequence[int]], limit: int, stop: frozenset[int]) -> list[list[int]]:
        """Decode greedily until every row has met a stop token, or has `limit` tokens. Measures the pace."""
        begun = time.perf_counter()
        columns, valid = self._columns(prompts, left=True)  # left: every prompt ends in the last column
        newest = self._read(columns, valid).argmax(dim=-1)
        first = time.perf_counter()
        steps = 0
        answers: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        while True:
            for row, token in enumerate(newest.tolist()):
                going[row] = going[row] and token not in stop
                if going[row]:
                    answers[row].append(token)
            longest = max(len(answer) for answer in answers)
            if not any(going) or longest >= limit:
                break
            # Rows that have ended read pads, which leave them as they are.
            valid = torch.tensor(going, device=self.mask.device)[:, None]
            columns = newest[:, None].masked_fill(~valid, self.pad)
            newest = self._read(columns, valid).argmax(dim=-1)
            steps += 1
        rest_seconds = time.perf_counter() - first
        self.pace = Pace(first_seconds=first - begun, rest_seconds=rest_seconds, steps=steps)
        return answers

    def _read(self, columns: Int[Tensor, "B Q"], valid: Bool[Tensor, "B Q"]) -> Float[Tensor, "B vocabulary"]:
        """Run a forward. Return the logits at the last column."""
        return self._forward(columns, valid, newest=1)[:, -1]

    def _forward(
        self, columns: Int[Tensor, "B Q"], valid: Bool[Tensor, "B Q"], *, newest: int
    ) -> Float[Tensor, "B newest vocabulary"]:
        """Run a forward. Return the logits at the newest columns; 0 means all of them."""
        mask = torch.cat([self.mask, valid], dim=1)
        # A token's position is the count of real tokens before it in its row; a pad's does not matter, but must exist.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -columns.shape[1] :]
        with torch.no_grad():
            out = self.model(
                columns,
                attention_mask=mask.long(),
                position_ids=positions,
                use_cache=True,
                logits_to_keep=newest,
                **given(self.model, self.cache),
            )
        self.mask = mask
        return out.logits

    def _columns(
        self, chunks: Sequence[Sequence[int]], *, left: bool
    ) -> tuple[Int[Tensor, "B Q"], Bool[Tensor, "B Q"]]:
        """Lay chunks out as one rectangle of ids, padded on one side, and its mask of real tokens."""
        widest = max(len(chunk) for chunk in chunks)
        self._refuse_ragged_windows(chunks, widest)
        ids = torch.full((len(chunks), widest), self.pad)
        valid = torch.zeros(len(chunks), widest, dtype=torch.bool)
        for row, chunk in enumerate(chunks):
            start = widest - len(chunk) if left else 0
            filled = slice(start, start + len(chunk))
            ids[row, filled] = torch.tensor(list(chunk), dtype=torch.long)
            valid[row, filled] = True
        return ids.to(self.mask.device), valid.to(self.mask.device)

    def _count(self, chunks: Sequence[Sequence[int]]) -> None:
        # A new list: who keeps the old one to go back to it finds it unchanged.
        self.fed_tokens = [fed + len(chunk) for fed, chunk in zip(self.fed_tokens, chunks, strict=True)]

    def _refuse_empty(self, chunks: Sequence[Sequence[int]]) -> None:
        empty = [row for row, chunk in enumerate(chunks) if not len(chunk)]
        if empty:
            raise DataError(f"row {empty[0]} was given an empty prompt; nothing follows from nothing; give it a token")

    def _refuse_too_long(self, more: Sequence[int]) -> None:
        if len(more) != len(self.fed_tokens):
            raise DataError(
                f"{len(more)} chunks were given; there are {len(self.fed_tokens)} rows; give one chunk for each row"
            )
        longest = max(fed + count for fed, count in zip(self.fed_tokens, more, strict=True))
        if self._position_limit is not None and longest > self._position_limit:
            raise ModelError(
                f"a row of {longest} tokens was asked for; the model has {self._position_limit} positions; "
                "shorten the conversation or the answer: folding saves memory, not positions"
            )

    def _refuse_ragged_windows(self, chunks: Sequence[Sequence[int]], widest: int) -> None:
        """Raise CacheError for pads before layers that read them: a row's window or state would be another."""
        ragged = any(len(chunk) != widest for chunk in chunks)
        layers: list[Any] = list(self.cache.layers)
        if ragged and any(map(reads_pads, layers)):
            raise CacheError(
                "rows of different length were given to a model with sliding or recurrent layers; pads count there; "
                "run such rows one by one, or give chunks of equal length"
            )
