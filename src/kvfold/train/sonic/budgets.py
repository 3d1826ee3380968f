"""Budgets of the segments of a conversation: drawn anew in every training step, or fixed for checks.

A budget says how many slots a segment of so many tokens is folded into. Dynamic budgets make one adapter serve all of
them. Knows nothing of masks.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkBudget:
    """The budget of one conversation."""

    slots_of: Callable[[int], int]  # tokens of a segment -> its slots


@runtime_checkable
class Budgets(Protocol):
    """A source of budgets, one for each conversation."""

    def of_talk(self, rng: random.Random) -> TalkBudget:
        """The budget of the next conversation."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnBudgets:
    """Budgets of a training step, each drawn from a random state."""

    least: float = 0.03
    most: float = 0.5
    raw: float = 0.03  # chance that a segment stays as it is
    gone: float = 0.03  # chance that nothing stays of it
    sinks: int = 4
    gaps: int = 2000  # longest jump in positions between segments, in a third of the conversations

    def of_talk(self, rng: random.Random) -> TalkBudget:
        """Draw the kept fraction of a conversation."""
        keep = self.keep(rng)

        def slots_of(tokens: int) -> int:
            return self.slots(rng, keep, tokens)

        return TalkBudget(slots_of=slots_of)

    def keep(self, rng: random.Random) -> float:
        """Draw a kept fraction, evenly on a log scale."""
        return self.least * (self.most / self.least) ** rng.random()

    def slots(self, rng: random.Random, keep: float, tokens: int) -> int:
        """Draw the slots of one segment of so many tokens: about `keep`, now and then none or all."""
        draw = rng.random()
        if draw < self.gone:
            return 0
        if draw < self.gone + self.raw:
            return tokens
        about = int(keep * rng.uniform(0.5, 1.5) * tokens)
        return min(tokens, max(1, about))


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedBudgets:
    """The same budget for every conversation, for checks."""

    slots_of: Callable[[int], int]  # tokens of a segment -> its slots

    def of_talk(self, rng: random.Random) -> TalkBudget:
        """The same budget, whatever the random state."""
        return TalkBudget(slots_of=self.slots_of)
