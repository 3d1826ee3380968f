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
            raw=torch.zeros(rows, heads, 0, device=keys.device),  # B H columns
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
        if queries.shape[2] == 1 and not tail.padded:  # a new token sees every column, itself too
            raw = attention_sums(queries, tail.keys[:, :, : tail.length], weights, scale=seen.scale)
            raw[:, :, : self.raw.shape[2]] += self.raw
            return ReceivedAttention(raw=raw, folded=folded, counts=self.counts)
        # Nothing is added in place: a forward is undone by the old record.
        raw = self.raw.new_zeros(*self.raw.shape[:2], tail.length)
        raw[:, :, : self.raw.shape[2]] = self.raw  # columns that were loaded without a forward have received nothing
        # Every new query sees every earlier column; new columns are seen causally, as a triangle.
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
            raw = raw.masked_fill(~tail.valid[:, None], 0.0)  # pads were scored like tokens
        return replace(self, raw=raw, folded=folded)

    def fold(self, event: FoldEvent) -> "ReceivedAttention":
        """Move the sums of kept columns behind those of the folded slots that stay."""
        assert event.made == 0, "slots that a method makes have received no attention"
        folded, counts = self.folded, self.counts
        if event.history is not None:
            folded, counts = folded[event.history], ragged.counts_after(counts, event.history)
        # A mask over [B, H, columns] picks in flat order: row by row, head by head, oldest first.
        fresh, more = self.raw[:, :, : event.columns][event.kept], ragged.counted(event.kept)
        # Each head's kept columns go behind its folded slots, not behind those of all heads.
        order = ragged.interleave(counts, more).to(folded.device)
        return replace(
            self,
            raw=self.raw[:, :, event.columns :].clone(),  # a view would keep what left alive
            folded=torch.cat([folded, fresh])[order],
            counts=ragged.added(counts, more),
        )

    def crop(self, stops: Sequence[int], columns: int) -> "ReceivedAttention":
        """Refuse: attention that was added up cannot be taken back, and layers ask for no crop here."""
        raise AssertionError("layers refuse a crop where attention was added up")

    def invalidate(self, gone: Int[Tensor, "B columns"]) -> "ReceivedAttention":
        """Leave the sums as they are: the next `observe` sets those of pads to 0, by the mask of the tail."""
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
        group = queries.shape[1] // len(self.counts[0])  # query heads of a key/value head
        gained = []
        for rows, heads in _rectangles(self.counts):
            part = seen.folded if len(rows) == len(self.counts) else seen.folded.take_rows(rows)
            of_rows = slice(rows[0], rows[-1] + 1)  # rows of a rectangle are neighbours
            # Key/value head h is read by the query heads h * group up to (h + 1) * group.
            of_heads = slice(None) if heads == slice(None) else slice(heads.start * group, heads.stop * group)
            received = attention_sums(
                queries[of_rows, of_heads],
                part.read(heads).keys,
                weights[of_rows, of_heads],
                scale=seen.scale,
                counted=None if seen.valid is None else seen.valid[of_rows],
            )
            gained.append(received.flatten())  # B H S, flat: row by row, head by head
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
