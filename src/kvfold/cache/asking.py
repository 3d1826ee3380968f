"""Asking: what a part is told before new tokens attend over it, so that it can choose what they will read.

Parts that are read as a whole do not look at it. It holds no slots and knows no part.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.cache.window import QueryWindow


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """New tokens of one forward, or some of them, about to attend."""

    queries: Float[Tensor, "B G Q D"]
    scale: float
    valid: Bool[Tensor, "B Q"] | None  # None: no pads
    window: QueryWindow | None  # earlier queries, where somebody needs them
    ended: Bool[Tensor, " B"] | None  # whether a sentence ended just before; None: not known
