"""Asking: what a part is told before new tokens attend over it, so that it can choose what they will read.

Parts that are read as a whole do not look at it. It holds no slots and knows no part.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.memory.tail import PAD
from kvfold.memory.window import QueryWindow


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """New tokens of one forward, or some of them, about to attend."""

    queries: Float[Tensor, "B G Q D"]
    scale: float
    valid: Bool[Tensor, "B Q"] | None  # None: no pads
    window: QueryWindow | None  # earlier queries, where somebody needs them
    ended: Bool[Tensor, " B"] | None  # whether a sentence ended just before; None: not known

    def mean(self, heads: int) -> Float[Tensor, "L D"]:
        """The mean query of each row and key/value head."""
        return self.queries.unflatten(1, (heads, -1)).float().mean(dim=(2, 3)).flatten(0, 1)

    def newest(self, count: int, heads: int) -> tuple[Float[Tensor, "L K D"], Bool[Tensor, "L K"] | None]:
        """So many queries of the window and the first new one, of each row and head, and which are real; None: all."""
        queries, window = self.queries[:, :, :1], self.window
        group = queries.shape[1] // heads
        real = None if self.valid is None else self.valid[:, :1]
        if window is not None:
            queries = torch.cat([window.queries[:, :, -count:], queries], dim=2)
            there = window.positions[:, -count:] != PAD
            now = there.new_ones(there.shape[0], 1) if real is None else real
            real = torch.cat([there, now], dim=1)
        if real is not None:
            real = real[:, None, None].expand(-1, heads, group, -1).flatten(2).flatten(0, 1)
        return queries.unflatten(1, (heads, group)).flatten(2, 3).flatten(0, 1), real
