"""Spread queries: some queries of a layer since its last fold, evenly spread over the text.

Methods that fit slots to what a segment's queries read of it record them. The record holds at most `count` queries of
each row: when it is full, every other one leaves, and from then on half as many are taken.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from kvfold.memory.recent_queries import QueryWindow, RecentQueries
from kvfold.memory.recorders import Observation, Recorder


@dataclass(frozen=True, slots=True)
class SpreadQueries(Recorder):
    """Record at most `count` queries of each row."""

    count: int

    name: ClassVar[str] = "spread"

    def open(self, keys: Float[Tensor, "B H Q D"]) -> "SpreadWindow":
        """Open a record without queries."""
        return SpreadWindow.of(QueryWindow.empty(keys, width=self.count))

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> "SpreadWindow":
        """Build the record that was saved."""
        window = RecentQueries(self.count).restore({}, tensors)
        return SpreadWindow.of(window, every=max(int(plain["every"]), 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadWindow(QueryWindow):
    """Every so manieth query of each row, oldest first; what a QueryWindow does, it does too."""

    every: int = 1  # columns from one query to the next

    @classmethod
    def of(cls, window: QueryWindow, *, every: int = 1) -> "SpreadWindow":
        """Take the queries of a window."""
        return cls(**dict(window.tensors()), width=window.width, padded=window.padded, every=every)

    def observe(self, seen: Observation) -> "SpreadWindow":
        """Append the queries whose turn it is; thin out what is held where they have no room."""
        start = seen.tail.start + seen.before
        new = seen.queries.shape[2]
        held = self
        while held.positions.shape[1] + len(range(-start % held.every, new, held.every)) > held.width:
            held = held._thinned()
        first = -start % held.every
        if first >= new:
            return held
        taken = slice(first, None, held.every)
        valid = None if seen.valid is None else seen.valid[:, taken]
        after = held._after(
            seen.queries[:, :, taken].detach(),
            seen.log_sum_exp[:, :, taken].detach(),
            seen.positions[:, taken],
            valid,
        )
        assert isinstance(after, SpreadWindow)
        return after

    def plain(self) -> dict[str, Any]:
        """Give the distance of two queries."""
        return {"every": self.every}

    def _thinned(self) -> "SpreadWindow":
        """Drop every other query."""
        return replace(
            self,
            queries=self.queries[:, :, ::2].clone(),
            log_sum_exp=self.log_sum_exp[:, :, ::2].clone(),
            positions=self.positions[:, ::2].clone(),
            every=2 * self.every,
        )
