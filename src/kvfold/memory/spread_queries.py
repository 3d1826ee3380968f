"""Spread queries: some queries of a layer since its last fold, evenly spread over the text.

Methods that fit slots to what a segment's queries read of it record them. The record holds at most `count` queries of
each row. When a row's are full, those leave that lie nearer to each other than twice the distance of before, and from
then on half as many are taken. A fold begins anew with every query; those of tokens that are still raw stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.memory.recent_queries import QueryWindow, RecentQueries
from kvfold.memory.recorders import FoldEvent, Observation, Recorder
from kvfold.memory.tail import PAD


@dataclass(frozen=True, slots=True)
class SpreadQueries(Recorder):
    """Record at most `count` queries of each row."""

    count: int

    name: ClassVar[str] = "spread"

    def open(self, keys: Float[Tensor, "B H Q D"]) -> "SpreadWindow":
        """Open a record without queries."""
        return SpreadWindow.of(QueryWindow.empty(keys, width=self.count))

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> "SpreadWindow":
        """Build the record that was saved; an earlier form had one distance for all rows."""
        window = RecentQueries(self.count).restore({}, tensors)
        saved = plain["every"]
        every = saved if isinstance(saved, list) else [saved] * len(window.positions)
        return SpreadWindow.of(window, every=tuple(max(int(one), 1) for one in every))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadWindow(QueryWindow):
    """Every so manieth query of each row, oldest first; what a QueryWindow does, it does too."""

    every: tuple[int, ...] = ()  # of each row, columns from one query to the next

    @classmethod
    def of(cls, window: QueryWindow, *, every: tuple[int, ...] | None = None) -> "SpreadWindow":
        """Take the queries of a window."""
        every = (1,) * len(window.positions) if every is None else every
        return cls(**dict(window.tensors()), width=window.width, padded=window.padded, every=every)

    def observe(self, seen: Observation) -> "SpreadWindow":
        """Append the queries whose turn it is; thin out what is held where they have no room."""
        if seen.valid is None and not self.padded:
            return self._of_like_rows(seen)
        return self._of_each_row(seen)

    def fold(self, event: FoldEvent) -> "QueryWindow | None":
        """Keep the queries of tokens that are still raw, and take every query from now on."""
        left = QueryWindow.fold(self, event)
        if not isinstance(left, SpreadWindow) or not event.for_select:
            return left
        return replace(left, every=(1,) * len(self.every))

    def take_rows(self, rows: Sequence[int]) -> "SpreadWindow":
        """Pick these rows, in this order, repeats allowed."""
        chosen = QueryWindow.take_rows(self, rows)
        assert isinstance(chosen, SpreadWindow)
        return replace(chosen, every=tuple(self.every[row] for row in rows))

    def plain(self) -> dict[str, Any]:
        """Give the distance of two queries in each row."""
        return {"every": list(self.every)}

    def _of_like_rows(self, seen: Observation) -> "SpreadWindow":
        """Observe rows without pads, which all hold queries of the same tokens; nothing is read from the device."""
        start, new = seen.tail.start + seen.before, seen.queries.shape[2]
        held, every = self, self.every[0]
        while held.positions.shape[1] + len(range(-start % every, new, every)) > held.width:
            every *= 2
            at = self._columns(_spaced(held.positions[0].tolist(), every))
            held = replace(
                held,
                queries=held.queries[:, :, at],
                log_sum_exp=held.log_sum_exp[:, :, at],
                positions=held.positions[:, at],
                every=(every,) * len(self.every),
            )
        return held._with(seen, range(-start % every, new, every), valid=None)

    def _of_each_row(self, seen: Observation) -> "SpreadWindow":
        """Observe rows with pads: each row is thinned by its own number of tokens."""
        start, new = seen.tail.start + seen.before, seen.queries.shape[2]
        real = [[True] * new] * len(self.every) if seen.valid is None else seen.valid.tolist()
        distances, stay, taken = [], [], []
        for positions, every, is_real in zip(self.positions.tolist(), self.every, real, strict=True):
            left = [at for at, position in enumerate(positions) if position != PAD]
            due = [column for column in range(new) if is_real[column] and (start + column) % every == 0]
            while len(left) + len(due) > self.width:
                every *= 2
                left = [left[i] for i in _spaced([positions[at] for at in left], every)]
                due = [column for column in due if (start + column) % every == 0]
            distances.append(every)
            staying, taking = set(left), set(due)
            stay.append([at in staying for at in range(len(positions))])
            taken.append([column in taking for column in range(new)])
        thinned = self._where(torch.tensor(stay, dtype=torch.bool, device=self.positions.device))
        assert isinstance(thinned, SpreadWindow)
        valid = torch.tensor(taken, dtype=torch.bool, device=self.positions.device)
        columns = valid.any(dim=0).nonzero()[:, 0].tolist()
        return replace(thinned, every=tuple(distances))._with(seen, columns, valid=valid)

    def _with(self, seen: Observation, columns: Sequence[int], *, valid: Tensor | None) -> "SpreadWindow":
        """Append the queries of these columns of an observation."""
        if not columns:
            return self
        at = self._columns(columns)
        after = self._after(
            seen.queries[:, :, at].detach(),
            seen.log_sum_exp[:, :, at].detach(),
            seen.positions[:, at],
            None if valid is None else valid[:, at],
        )
        assert isinstance(after, SpreadWindow)
        return after

    def _columns(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.long, device=self.positions.device)


def _spaced(positions: Sequence[int], least: int) -> list[int]:
    """List the numbers of the positions that stay where no two may be nearer than `least`; the first one stays."""
    chosen: list[int] = []
    for number, position in enumerate(positions):
        if not chosen or position - positions[chosen[-1]] >= least:
            chosen.append(number)
    return chosen
