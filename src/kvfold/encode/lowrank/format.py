"""LowRankFormat: how one layer's slots are written: its bases, and how many dimensions each level has.

A level is a number of key dimensions and of value dimensions; both grow with it. A rank allocation gives each slot of a
segment a level. It holds no slots, and does not know who allocates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from kvfold.attention.basis import Bases

Levels: TypeAlias = tuple[tuple[int, int], ...]  # dimensions of keys and of values, growing
RankAllocation: TypeAlias = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # latents of keys, of values, positions -> levels


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankFormat:
    """The bases and levels of one layer."""

    bases: Bases
    levels: Levels
    int8: bool = False  # latents are stored as signed bytes and scales

    @property
    def size(self) -> int:
        """Count the numbers of a slot in full, keys and values of all heads."""
        return self.bases.keys.mean.shape[0] + self.bases.values.mean.shape[0]

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
        sides = (self.bases.keys, self.bases.values)
        return sum(tensor.nbytes for side in sides for tensor in (side.encode, side.decode, side.mean))

    def dims_at(self, rate: float) -> tuple[int, int]:
        """Give dimensions of keys and values that keep this share of the numbers, on the way between two levels."""
        wanted, parts = round(rate * self.size), self.bases.keys.parts
        for (keys, values), (more_keys, more_values) in zip(self.levels, self.levels[1:], strict=False):
            if wanted > more_keys + more_values:
                continue
            step = more_keys + more_values - keys - values
            # Parts share key dimensions evenly, so these grow by a multiple of their number.
            added = round((more_keys - keys) * (wanted - keys - values) / step / parts) * parts
            least = -((self.levels[-1][1] - wanted) // parts) * parts  # else values would have more than there are
            most = wanted // parts * parts
            keys = min(max(keys + added, least), most)
            return keys, wanted - keys
        return self.levels[-1]
