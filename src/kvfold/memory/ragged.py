"""Ragged: flat tensors that hold a different number of slots for each row and head.

The order is row by row, head by head, oldest first. Counts say how many slots each row and head has. These functions
give the index that turns one flat tensor into another; whoever holds the tensors applies it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Counts: TypeAlias = tuple[tuple[int, ...], ...]  # slots of each row, of each key/value head


def total(counts: Counts) -> int:
    """Count the slots of all rows and heads."""
    return sum(sum(row) for row in counts)


def uniform(counts: Counts) -> bool:
    """Tell whether every row and head holds the same number of slots."""
    return len({count for row in counts for count in row}) <= 1


def flat(counts: Counts) -> tuple[int, ...]:
    """List the counts of all rows and heads in flat order."""
    return tuple(count for row in counts for count in row)


def added(first: Counts, second: Counts) -> Counts:
    """Add two counts, head by head."""
    pairs = zip(first, second, strict=True)
    return tuple(tuple(a + b for a, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs)


def counted(kept: Bool[Tensor, "B H S"]) -> Counts:
    """Count the slots that are True."""
    return tuple(tuple(row) for row in kept.sum(dim=2).tolist())  # of [B, H, S] the last dimension


def counts_after(counts: Counts, kept: Bool[Tensor, " slots"]) -> Counts:
    """Count the flat slots that are True, row by row and head by head."""
    pieces = iter(kept.split(list(flat(counts))))  # one of each head, in flat order
    return tuple(tuple(int(next(pieces).sum()) for _ in row) for row in counts)


def row_starts(counts: Counts) -> list[int]:
    """List where each row begins in flat order, and where the last one ends."""
    return [0, *accumulate(sum(row) for row in counts)]


def order_of_rows(counts: Counts, rows: Sequence[int]) -> Int[Tensor, " slots"]:
    """Index the flat slots of these rows, in this order, repeats allowed. Slots of one row lie together."""
    starts = row_starts(counts)
    return torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])


def rectangle(counts: Counts, rows: Sequence[int], heads: slice) -> Int[Tensor, "B H S"]:
    """Index the flat slots of some rows and heads that all hold equally many."""
    starts = [0, *accumulate(flat(counts))]  # where row r, head h begins: at r * number + h
    number = len(counts[0])  # heads of a row
    chosen = range(number)[heads]
    length = counts[rows[0]][chosen[0]]  # the same for all that are asked for
    first = torch.tensor([[starts[row * number + head] for head in chosen] for row in rows])  # B H
    return first[..., None] + torch.arange(length)  # B H S


def places(counts: Counts, room: Counts) -> Int[Tensor, " slots"]:
    """Index the slots of each row and head in storage that has `room` for each."""
    sizes, spaces = torch.tensor(flat(counts)), torch.tensor(flat(room))
    # Counting up over all slots, each head is off by the room of those before it that holds no slot.
    offsets = (spaces - sizes).cumsum(dim=0) - (spaces - sizes)
    return torch.arange(int(sizes.sum())) + offsets.repeat_interleave(sizes)


def interleave(first: Counts, second: Counts) -> Int[Tensor, " slots"]:
    """Index [all slots of first, all slots of second] so that each head has its first slots, then its second ones."""
    pieces = []
    at, after = 0, total(first)  # where the next slots of either begin
    for mine, theirs in zip(flat(first), flat(second), strict=True):
        pieces += [torch.arange(at, at + mine), torch.arange(after, after + theirs)]
        at, after = at + mine, after + theirs
    return torch.cat(pieces)
