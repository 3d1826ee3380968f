"""Recent queries: the newest queries of a layer since its last fold, row by row, with their log-sum-exp.

Methods that score slots by the attention of recent queries (SnapKV) record them. Pads never enter the window; a row
with fewer queries than the window has position PAD (-1) in front. A fold empties it.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.rotary import Turn
from kvfold.memory.kv import positions_of_rows
from kvfold.memory.recorders import FoldEvent, Observation, Record, Recorder
from kvfold.memory.tail import PAD


@dataclass(frozen=True, slots=True)
class RecentQueries(Recorder):
    """Record the newest `count` queries of each row."""

    count: int

    name: ClassVar[str] = "window"

    def open(self, keys: Float[Tensor, "B H Q D"]) -> "QueryWindow":
        """Open a window without queries; the first ones say how many heads there are."""
        return QueryWindow.empty(keys, width=self.count)

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> "QueryWindow":
        """Build the window that was saved."""
        return QueryWindow(
            queries=tensors["queries"],
            log_sum_exp=tensors["log_sum_exp"],
            positions=tensors["positions"],
            width=self.count,
        )

    def narrowed(self, record: Record) -> "QueryWindow":
        """Keep the newest `count` queries."""
        assert isinstance(record, QueryWindow)
        newest = record.last(self.count)
        held = {name: tensor.clone() for name, tensor in newest.tensors()}  # views would keep the rest alive
        return replace(newest, **held, width=self.count)

    def joined(self, other: Recorder) -> "RecentQueries":
        """Record the larger count of the two settings."""
        assert isinstance(other, RecentQueries)
        return RecentQueries(max(self.count, other.count))


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryWindow(Record):
    """At most `width` queries of each row, oldest first."""

    queries: Float[Tensor, "B G W D"]
    log_sum_exp: Float[Tensor, "B G W"]  # over the whole layer as it was then
    positions: Int[Tensor, "B W"]  # int32, PAD where the row has no query there
    width: int
    padded: bool = True  # whether any place may be PAD

    @classmethod
    def empty(cls, like: Float[Tensor, "B N Q D"], *, width: int = sys.maxsize) -> "QueryWindow":
        """Make a window without queries, for rows and head sizes like these; the first ones say how many heads."""
        rows, _, _, size = like.shape
        return cls(
            queries=like.new_empty(rows, 0, 0, size),
            log_sum_exp=torch.empty(rows, 0, 0, dtype=torch.float32, device=like.device),
            positions=torch.empty(rows, 0, dtype=torch.int32, device=like.device),
            width=width,
            padded=False,
        )

    def observe(self, seen: Observation) -> "QueryWindow":
        """Append queries, and drop the oldest ones beyond the width."""
        return self._after(
            seen.queries.detach(),
            seen.log_sum_exp.detach(),
            seen.positions,
            seen.valid,
        )

    def followed_by(
        self,
        queries: Float[Tensor, "B G Q D"],
        *,
        positions: Int[Tensor, "#B Q"],
        valid: Bool[Tensor, "B Q"] | None,
    ) -> "QueryWindow":
        """Append queries whose log-sum-exp is not known yet; for readers of queries and positions only."""
        # 0 is no log-sum-exp of theirs: whoever scores by weights must not read these.
        unknown = torch.zeros(queries.shape[:3], dtype=self.log_sum_exp.dtype, device=queries.device)
        return self._after(queries, unknown, positions, valid)

    def fold(self, event: FoldEvent) -> "QueryWindow | None":
        """Keep the queries of tokens that are still raw; all of them where only the place reads them."""
        if not event.for_select:
            return self
        if event.tail.length == 0:  # then no query's token is raw
            return None
        raw = event.tail.valid.sum(dim=1).tolist()
        # Positions count real tokens: the raw ones of a row are its newest, up to the position that comes next.
        first = [stop - int(count) for stop, count in zip(event.next_positions, raw, strict=True)]
        return self.since(torch.tensor(first, device=self.positions.device))

    def crop(self, stops: Sequence[int], columns: int) -> "QueryWindow":
        """Drop the queries at or after the position that comes next."""
        stop = torch.tensor(list(stops), device=self.positions.device)  # B
        return self._where(self.positions < stop[:, None])  # PAD is less too, and stays PAD

    def invalidate(self, gone: Int[Tensor, "B columns"]) -> "QueryWindow":
        """Drop the queries at these positions of each row."""
        return self._where(~(self.positions[:, :, None] == gone[:, None]).any(dim=2))  # B W columns: any match

    def moved(self, back: Int[Tensor, " B"], turn: Turn) -> "QueryWindow":
        """Turn the queries with their tokens, which are raw."""
        real = self.positions != PAD
        positions = torch.where(real, self.positions - back[:, None], PAD)  # B W
        heads = self.queries.shape[1]  # all of them stand where their token does
        before = positions_of_rows(self.positions, heads)
        after = positions_of_rows(positions, heads)
        return replace(self, queries=turn(self.queries, before, after), positions=positions)

    def take_rows(self, rows: Sequence[int]) -> "QueryWindow":
        """Pick these rows, in this order, repeats allowed."""
        chosen = torch.tensor(list(rows), device=self.queries.device)
        return replace(self, **{name: tensor[chosen] for name, tensor in self.tensors()})

    def since(self, position: Int[Tensor, " B"]) -> "QueryWindow":
        """Drop the queries before a position of each row."""
        return self._where(self.positions >= position[:, None])

    def last(self, count: int) -> "QueryWindow":
        """Give the newest `count` queries; another member may have asked for more."""
        newest = slice(-count, None)  # of all places, pads included
        return replace(
            self,
            queries=self.queries[:, :, newest],
            log_sum_exp=self.log_sum_exp[:, :, newest],
            positions=self.positions[:, newest],
        )

    def heads(self, heads: slice) -> "QueryWindow":
        """Slice some query heads."""
        return replace(self, queries=self.queries[:, heads], log_sum_exp=self.log_sum_exp[:, heads])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield queries, log-sum-exp and positions."""
        yield from (("queries", self.queries), ("log_sum_exp", self.log_sum_exp), ("positions", self.positions))

    def _after(
        self,
        queries: Tensor,
        log_sum_exp: Tensor,
        positions: Tensor,
        valid: Tensor | None,
    ) -> "QueryWindow":
        marked = positions.to(torch.int32)
        if valid is not None:
            marked = marked.masked_fill(~valid, PAD)
        marked = marked.expand(queries.shape[0], -1)  # B Q; rows may share one line of positions
        # Without pads the newest queries are the last ones of every row, and no sort is needed.
        sorts = valid is not None or self.padded
        held, new = self.positions.shape[1], marked.shape[1]
        surplus = 0 if sorts else held + new - self.width
        old = slice(max(0, surplus), None)
        fresh = slice(max(0, surplus - held), None)
        queries = queries[:, :, fresh]
        log_sum_exp = log_sum_exp[:, :, fresh]
        marked = marked[:, fresh]
        if held:
            queries = torch.cat([self.queries[:, :, old], queries], dim=2)
            log_sum_exp = torch.cat([self.log_sum_exp[:, :, old], log_sum_exp], dim=2)
            marked = torch.cat([self.positions[:, old], marked], dim=1)
        else:  # a view would keep all of them alive
            queries = queries.clone()
            log_sum_exp = log_sum_exp.clone()
            marked = marked.clone()
        if sorts:
            return self._newest(queries, log_sum_exp, marked, self.width)
        return replace(self, queries=queries, log_sum_exp=log_sum_exp, positions=marked)

    def _where(self, stay: Bool[Tensor, "B W"]) -> "QueryWindow":
        kept = torch.where(stay, self.positions, PAD)  # dropping a query makes it a pad
        width = int((kept != PAD).sum(dim=1).max()) if kept.shape[1] else 0  # what the fullest row has
        return self._newest(self.queries, self.log_sum_exp, kept, width)

    def _newest(
        self,
        queries: Tensor,
        log_sum_exp: Tensor,
        positions: Tensor,
        width: int,
    ) -> "QueryWindow":
        """Keep the last `width` real queries of each row; a stable sort moves pads to the front, in order."""
        order = (positions != PAD).to(torch.int8).argsort(dim=1, stable=True)  # pads are 0, so they come first
        order = order[:, max(positions.shape[1] - width, 0) :]  # B W
        heads, size = queries.shape[1], queries.shape[3]
        return replace(
            self,
            queries=queries.gather(2, order[:, None, :, None].expand(-1, heads, -1, size)),  # rows differ, heads do not
            log_sum_exp=log_sum_exp.gather(2, order[:, None].expand(-1, heads, -1)),
            positions=positions.gather(1, order),
            padded=True,
        )
