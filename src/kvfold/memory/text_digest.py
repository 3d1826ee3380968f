"""TextDigest: a number of 64 bits a row that tells one text from another, in place of the ids that a cache was fed.

Each column has a random odd weight, the same in every process; a row's digest is the sum of its ids by these weights,
modulo 2**64. So it grows with the text, and texts that differ in an id or in its place have other sums, but for one
pair in 2**64. It covers the first columns, up to a forward whose ids nobody knew. It holds no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

_BLOCK = 1024  # columns whose weights are made together
_EARLIER = 16  # turns of one text to which a crop may go back
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDigest:
    """The digest of a text's first columns, pads included as they were fed. A value."""

    columns: int = 0  # that it covers
    sums: tuple[int, ...] = ()  # by row
    earlier: tuple["TextDigest", ...] = ()  # as it was before newer turns, the newest last

    def extended(self, ids: Int[Tensor, "B Q"]) -> "TextDigest":
        """Cover the ids of the columns that come next. They are read on the host."""
        new = ids.shape[1]
        earlier = self.earlier
        if new == 1:  # a decode step
            block, place = divmod(self.columns, _BLOCK)
            weight = int(_weights_of_block(block)[place])
            added = [number * weight for number in ids[:, 0].tolist()]
        else:
            weights = _weights(self.columns, new).to(ids.device)
            added = (ids.long() * weights).sum(dim=1).tolist()
            if self.columns:  # a turn begins
                turn = replace(self, earlier=())
                earlier = (*earlier, turn)[-_EARLIER:]
        held = self.sums or (0,) * len(added)
        sums = tuple((old + more) & _64_BITS for old, more in zip(held, added, strict=True))
        return TextDigest(columns=self.columns + new, sums=sums, earlier=earlier)

    def cropped(self, columns: int) -> "TextDigest":
        """Cover no more than the first so many columns; what a turn's own columns came to is not known."""
        if columns >= self.columns:
            return self
        kept = tuple(one for one in self.earlier if one.columns <= columns)
        if not kept:
            return TextDigest()
        return replace(kept[-1], earlier=kept[:-1])

    def take_rows(self, rows: Sequence[int]) -> "TextDigest":
        """Pick these rows, in this order, repeats allowed."""
        if self.columns == 0:
            return self
        return replace(
            self,
            sums=tuple(self.sums[row] for row in rows),
            earlier=tuple(one.take_rows(rows) for one in self.earlier),
        )

    def other_rows(self, ids: Int[Tensor, "B S"]) -> list[int]:
        """List the rows of a text that do not begin with the columns that are covered."""
        if self.columns == 0:
            return []
        theirs = TextDigest().extended(ids[:, : self.columns])
        return [row for row in range(len(self.sums)) if theirs.sums[row] != self.sums[row]]


def _weights(first: int, count: int) -> Int[Tensor, " Q"]:
    """Give the weights of some columns."""
    blocks = range(first // _BLOCK, (first + count - 1) // _BLOCK + 1)
    start = first % _BLOCK
    weights = torch.cat([_weights_of_block(number) for number in blocks])
    return weights[start : start + count]


@lru_cache(maxsize=64)
def _weights_of_block(number: int) -> Int[Tensor, " columns"]:
    """Make the weights of a block of columns: SplitMix64 of the column, made odd.

    Steele, Lea and Flood, Fast splittable pseudorandom number generators, https://doi.org/10.1145/2660193.2660195
    Ours differs: the lowest bit is set, so that no id of 32 bits may vanish in a product.
    """
    first = number * _BLOCK + 1
    columns = np.arange(first, first + _BLOCK, dtype=np.uint64)
    mixed = columns * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    mixed |= np.uint64(1)
    return torch.from_numpy(mixed.view(np.int64))
