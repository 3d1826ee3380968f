"""State: what one layer holds at one moment: sinks, the folded part, the raw tail, and records. A value.

A forward or a fold gives another state, so it is undone by putting the old one back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.errors import CacheError
from kvfold.memory.part import Part, slots_of_rows
from kvfold.memory.pending import PendingTokens
from kvfold.memory.recent_queries import QueryWindow, RecentQueries
from kvfold.memory.recorders import Record
from kvfold.memory.tail import PAD, Tail


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """Sinks, folded part, raw tail and records of one layer. All but the records follow one another in the text."""

    sinks: Part | None = None  # the first real tokens of each row, raw
    folded: Part | None = None
    tail: Tail | None = None
    recorded: Mapping[str, Record] = field(default_factory=dict)  # records, which have not seen the pending tokens
    pending: PendingTokens | None = None
    seen: tuple[int, ...] = ()  # real tokens of each row so far, the tail's included
    closed: tuple[int, ...] = ()  # positions of each row that gaps have left free (compaction.py); empty: none

    @property
    def records(self) -> Mapping[str, Record]:
        """Give the records by name, with every token seen."""
        if self.pending is None or self.tail is None:
            return self.recorded
        return self.pending.seen_by(self.recorded, self.tail, self.folded)

    @property
    def settled(self) -> "LayerState":
        """Let the records see every token."""
        return self if self.pending is None else self.with_records(self.records)

    def with_records(self, records: Mapping[str, Record]) -> "LayerState":
        """Put records that have seen every token in the place of those that are here."""
        return replace(self, recorded=records, pending=None)

    @property
    def recent(self) -> QueryWindow | None:
        """Give the recent queries, where they are recorded."""
        window = self.records.get(RecentQueries.name)
        return window if isinstance(window, QueryWindow) else None

    @property
    def next_positions(self) -> tuple[int, ...]:
        """Say where the next token of each row stands: behind every token, less the gaps that were closed."""
        if not self.closed:
            return self.seen
        return tuple(seen - closed for seen, closed in zip(self.seen, self.closed, strict=True))

    @property
    def pinned_of_rows(self) -> list[int]:
        """List the sinks that each row holds."""
        return [0] * len(self.seen) if self.sinks is None else slots_of_rows(self.sinks)

    @property
    def folded_of_rows(self) -> list[tuple[int, ...]]:
        """List the folded slots of each row's heads; an empty tuple where nothing was folded yet."""
        return [()] * len(self.seen) if self.folded is None else list(self.folded.counts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, as `part.name`."""
        for name, holder in self.holders():
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in holder.tensors())

    def holders(self) -> Iterator[tuple[str, Part | Tail | Record | PendingTokens]]:
        """Yield what there is, by name; records as they are held, and the tokens that they have not seen."""
        named = {
            "sinks": self.sinks,
            "folded": self.folded,
            "tail": self.tail,
            **self.recorded,
            "pending": self.pending,
        }
        yield from ((name, holder) for name, holder in named.items() if holder is not None)

    def tier_of(self, name: str) -> str | None:
        """Name the tier of a tensor that `tensors` names; None: the device that it is on."""
        part, _, inner = name.partition(".")
        if part != "folded" or self.folded is None:
            return None
        return self.folded.usage().tiers.get(inner)

    def take_rows(self, rows: Sequence[int]) -> "LayerState":
        """Pick these rows, in this order, repeats allowed."""
        return replace(
            self,
            sinks=None if self.sinks is None else self.sinks.take_rows(rows),
            folded=None if self.folded is None else self.folded.take_rows(rows),
            tail=None if self.tail is None else self.tail.take_rows(rows),
            recorded={name: record.take_rows(rows) for name, record in self.records.items()},
            pending=None,
            seen=tuple(self.seen[row] for row in rows),
            closed=tuple(self.closed[row] for row in rows) if self.closed else (),
        )

    def with_fresh_tail(self) -> "LayerState":
        """Copy the tail into fresh buffers, so that what others see in the old ones is not written over."""
        if self.tail is None:
            return self
        with torch.inference_mode(False):  # a later forward writes into these buffers, in any mode
            return replace(self, tail=self.tail.after(0))

    def invalidated(self, valid: Bool[Tensor, "B length"]) -> "LayerState":
        """Turn columns of the tail into pads where a later mask says that they are none of the row's tokens."""
        tail = self.tail
        if tail is None:
            return self
        gone = tail.valid & ~valid  # B length: were tokens, and are pads by the later mask
        if not gone.any():  # the usual case: a mask that grows says nothing new
            return self
        lost = gone.sum(dim=1).tolist()  # of each row
        at = tail.positions[:, : tail.length].masked_fill(~gone, PAD)  # B length: positions that are lost
        with torch.inference_mode(False):
            return replace(
                self,
                tail=tail.without(gone),
                recorded={name: record.invalidate(at) for name, record in self.records.items()},
                pending=None,
                seen=tuple(seen - int(count) for seen, count in zip(self.seen, lost, strict=True)),
            )

    def cropped(self, columns: int, *, allowed: bool) -> "LayerState":
        """Forget the newest columns; they must still be in the raw tail and in no sum."""
        tail = self.tail
        if columns == 0:
            return self
        if tail is None or columns > tail.length:
            held = 0 if tail is None else tail.length
            raise CacheError(
                f"asked to remove {columns} tokens, but only the newest {held} are still raw; fold later or crop less"
            )
        if not allowed:
            raise CacheError(
                "asked to remove tokens whose attention was already added up; use a plan that keeps no such sums"
            )
        removed = tail.valid[:, tail.length - columns :].sum(dim=1).tolist()  # real tokens of each row
        seen = tuple(seen - int(count) for seen, count in zip(self.seen, removed, strict=True))
        cropped = replace(self, tail=tail.cropped(tail.length - columns), seen=seen)
        stops = cropped.next_positions
        with torch.inference_mode(False):
            records = {name: record.crop(stops, columns) for name, record in self.records.items()}
        return cropped.with_records(records)
