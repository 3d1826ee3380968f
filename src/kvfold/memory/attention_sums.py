"""Attention sums: how much attention each slot has received so far, averaged over the query group.

H2O evicts by them. Sums of raw tokens lie column by column; those of folded slots lie flat, in the order in which parts
are read (row by row, head by head, oldest first). They are float32, added up from the log-sum-exp of each forward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.attention.scores import attention_sums
from kvfold.memory import ragged
from kvfold.memory.ragged import Counts
from kvfold.memory.recorders import FoldEvent, Observation, Record, Recorder


@dataclass(frozen=True, slots=True)
class AttentionSums(Recorder):
    """Record the attention that every slot receives."""

    name: ClassVar[str] = "attention_sums"
    allows_crop: ClassVar[bool] = False

    def open(self, keys: Float[Tensor, "B H Q D"]) -> "ReceivedAttention":
        """Open a record of no slots."""
        rows, heads = keys.shape[:2]
        return ReceivedAttention(
            raw=torch.zeros(rows, heads, 0, device=keys.device),
            folded=torch.zeros(0, device=keys.device),
            counts=((0,) * heads,) * rows,
        )

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> "ReceivedAttention":
        """Build the record that was saved."""
        counts = tuple(tuple(row) for row in plain["counts"])
        if ragged.total(counts) != len(tensors["folded"]):
            raise ValueError(f"{ragged.total(counts)} sums are promised, and {len(tensors['folded'])} are there")
        return ReceivedAttention(**tensors, counts=counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedAttention(Record):
    """The sums of one layer."""

    raw: Float[Tensor, "B H columns"]
    folded: Float[Tensor, " slots"]
    counts: Counts  # folded slots of each row and head

    def observe(self, seen: Observation) -> "ReceivedAttention":
        """Add the attention of new queries to every slot that they saw."""
        queries, weights = seen.queries.detach(), seen.log_sum_exp.detach()
        folded = self.folded
        if len(folded):
            folded = folded + self._received(seen, queries, weights)
        tail, before = seen.tail, seen.before
        raw = self.raw.new_zeros(*self.raw.shape[:2], tail.length)
        raw[:, :, : self.raw.shape[2]] = self.raw  # columns that were loaded without a forward have received nothing
        old, new = tail.keys[:, :, :before], tail.keys[:, :, before : tail.length]
        raw[:, :, :before] += attention_sums(
            queries,
            old,
            weights,
            scale=seen.scale,
            counted=seen.valid,
        )
        raw[:, :, before:] += attention_sums(
            queries,
            new,
            weights,
            scale=seen.scale,
            causal=True,
            counted=seen.valid,
        )
        if tail.padded:
            raw = raw.masked_fill(~tail.valid[:, None], 0.0)
        return replace(self, raw=raw, folded=folded)

    def fold(self, event: FoldEvent) -> "ReceivedAttention":
        """Move the sums of kept columns behind those of the folded slots that stay."""
        assert event.made == 0, "slots that a method makes have received no attention"
        folded, counts = self.folded, self.counts
        if event.history is not None:
            folded, counts = folded[event.history], ragged.counts_after(counts, event.history)
        fresh, more = self.raw[:, :, : event.columns][event.kept], ragged.counted(event.kept)
        order = ragged.interleave(counts, more).to(folded.device)
        return replace(
            self,
            raw=self.raw[:, :, event.columns :].clone(),
            folded=torch.cat([folded, fresh])[order],
            counts=ragged.added(counts, more),
        )

    def crop(self, seen: Sequence[int], columns: int) -> "ReceivedAttention":
        """Never asked: sums cannot be taken back."""
        raise AssertionError("layers refuse a crop where attention was added up")

    def invalidate(self, gone: Int[Tensor, "B columns"]) -> "ReceivedAttention":
        """Set the sums of columns that turned out to be pads to 0 at the next observation: the tail knows them."""
        return self

    def take_rows(self, rows: Sequence[int]) -> "ReceivedAttention":
        """Pick these rows, in this order, repeats allowed."""
        order = ragged.order_of_rows(self.counts, rows).to(self.folded.device)
        return ReceivedAttention(
            raw=self.raw[list(rows)],
            folded=self.folded[order],
            counts=tuple(self.counts[row] for row in rows),
        )

    def of_folded(self, rows: Sequence[int], heads: slice) -> Float[Tensor, "B H S"]:
        """Read the sums of folded slots of rows and heads that hold equally many."""
        return self.folded[ragged.rectangle(self.counts, rows, heads).to(self.folded.device)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the sums of raw tokens and of folded slots."""
        yield from (("raw", self.raw), ("folded", self.folded))

    def plain(self) -> dict[str, Any]:
        """Give the counts of the folded slots."""
        return {"counts": [list(row) for row in self.counts]}

    def _received(self, seen: Observation, queries: Tensor, weights: Tensor) -> Tensor:
        """Sum the attention to folded slots, rectangle by rectangle, in flat order."""
        group = queries.shape[1] // len(self.counts[0])
        gained = []
        for rows, heads in _rectangles(self.counts):
            part = seen.folded if len(rows) == len(self.counts) else seen.folded.take_rows(rows)
            some = slice(rows[0], rows[-1] + 1)
            of_heads = slice(None) if heads == slice(None) else slice(heads.start * group, heads.stop * group)
            received = attention_sums(
                queries[some, of_heads],
                part.read(heads).keys,
                weights[some, of_heads],
                scale=seen.scale,
                counted=None if seen.valid is None else seen.valid[some],
            )
            gained.append(received.flatten())
        return torch.cat(gained)


def _rectangles(counts: Counts) -> Iterator[tuple[list[int], slice]]:
    """Cover all slots by rectangles, in flat order: everything, or a row each, or a head each."""
    if ragged.uniform(counts):
        yield list(range(len(counts))), slice(None)
        return
    for row, of_heads in enumerate(counts):
        if ragged.uniform((of_heads,)):
            yield [row], slice(None)
        else:
            yield from (([row], slice(head, head + 1)) for head in range(len(of_heads)))
