"""LowRankFormat: how one layer's slots are written: its bases, and how many dimensions each level has.

A level is a number of key dimensions and of value dimensions; both grow with it. A rank allocation gives each slot of a
segment a level. It holds no slots, and does not know who allocates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor

from kvfold.attention.basis import Bases

Levels: TypeAlias = tuple[tuple[int, int], ...]  # dimensions of keys and of values, growing
# Latents of keys [S, K], of values [S, V] and positions [S] of a row's segment -> the level of each slot [S].
RankAllocation: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankFormat:
    """The bases and levels of one layer."""

    bases: Bases
    levels: Levels
    int8: bool = False  # latents are stored as signed bytes and scales

    @property
    def size(self) -> int:
        """Count the numbers of a slot in full, keys and values of all heads."""
        return self.bases.keys.mean.shape[0] + self.bases.values.mean.shape[0]  # a mean has a number for each

    @property
    def dims(self) -> list[int]:
        """List the numbers of a slot at each level, keys and values together."""
        return [sum(level) for level in self.levels]

    @property
    def parts(self) -> list[int]:
        """Say in how many parts keys and values are written."""
        return [self.bases.keys.parts, self.bases.values.parts]

    @property
    def weight_bytes(self) -> int:
        """Count the bytes of the bases, which belong to the model and not to a cache."""
        total = 0
        for basis in (self.bases.keys, self.bases.values):
            total += basis.encode.nbytes + basis.decode.nbytes + basis.mean.nbytes
        return total

    def dims_at(self, rate: float) -> tuple[int, int]:
        """Give dimensions of keys and values that keep this share of the numbers, on the way between two levels."""
        wanted = round(rate * self.size)
        parts = self.bases.keys.parts
        all_values = self.levels[-1][1]
        for less, more in pairwise(self.levels):
            if wanted > sum(more):
                continue
            keys, more_keys = less[0], more[0]
            step = sum(more) - sum(less)
            # Of the numbers beyond the lower level keys get the share that they have between the two levels.
            exact = (more_keys - keys) * (wanted - sum(less)) / step
            # Parts share key dimensions evenly, so these grow by a multiple of their number.
            added = round(exact / parts) * parts
            least = -((all_values - wanted) // parts) * parts  # rounded up: values get no more than there are
            most = wanted // parts * parts
            keys = min(max(keys + added, least), most)
            return keys, wanted - keys
        return self.levels[-1]
