"""What every part of a layer can do: attend for a query, say its bytes, and be cut to rows.

A part holds slots in one physical layout. It is a value: nothing changes it, an operation gives a new part, so an
interrupted fold leaves the old one as it was. Layouts are one file each (dense.py is the first).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from kvfold.attention.partial import Partial

Counts: TypeAlias = tuple[tuple[int, ...], ...]  # slots per row, per key/value head


class Part(ABC):
    """Slots of some rows and heads in one physical layout."""

    counts: Counts

    @abstractmethod
    def attend(self, queries: Float[Tensor, "B G Q D"], *, scale: float) -> Partial:
        """Attention of every query over every slot of its row; all slots lie before all queries."""

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> "Part":
        """The part with these rows, in this order, repeats allowed."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, by name: what is counted, moved and saved."""

    @property
    def slots(self) -> int:
        """Entries held over all rows and heads."""
        return sum(sum(row) for row in self.counts)

    @property
    def slots_of_rows(self) -> list[int]:
        """The most entries that a head of each row holds."""
        return [max(row) for row in self.counts]


def uniform(counts: Counts) -> bool:
    """Whether every row and head holds the same number of slots."""
    return len({count for row in counts for count in row}) <= 1


def positions_of_rows(rows: Int[Tensor, "B S"], heads: int) -> Int[Tensor, "B H S"]:
    """Positions of a row's tokens, for every head."""
    return rows[:, None].expand(-1, heads, -1)
