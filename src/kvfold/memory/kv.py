"""The values that flow between a layer, a method and a codec: keys, values and positions of some slots.

A rectangle of slots has the same number for every row and head. Counts say how many slots each row and head has where
these differ. Nothing here knows a method or a codec.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

Payload: TypeAlias = Mapping[str, Tensor]  # tensors whose leading dimensions are slots, as one codec writes them


@dataclass(frozen=True, slots=True)
class KV:
    """Keys, values and positions of a rectangle of slots in one layer, oldest first."""

    keys: Float[Tensor, "B H S D"]  # as the model handed them: after RoPE
    values: Float[Tensor, "B H S E"]
    positions: Int[Tensor, "B H S"]  # where each slot stood in the text, before any folding

    def __len__(self) -> int:
        return self.keys.shape[2]

    def heads(self, heads: slice) -> "KV":
        """Slice some heads."""
        return KV(self.keys[:, heads], self.values[:, heads], self.positions[:, heads])


def positions_of_rows(rows: Int[Tensor, "B S"], heads: int) -> Int[Tensor, "B H S"]:
    """Expand the positions of each row's tokens to every head."""
    return rows[:, None].expand(-1, heads, -1)  # a view: heads share their memory
