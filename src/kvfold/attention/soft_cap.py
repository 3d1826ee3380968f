"""Soft caps: models that bend every attention score before the softmax, s -> cap tanh(s / cap), as Gemma 2 does.

A cap belongs to the scale that precedes it, and whoever scores a slot is given that scale; so a CappedScale is a scale
that knows its cap. Products that are scaled already are bent by `capped`. It knows tensors only.
"""

from typing import Any

from torch import Tensor


class CappedScale(float):
    """A factor of attention scores whose products are bent towards a cap."""

    cap: float

    def __new__(cls, scale: float, cap: float) -> "CappedScale":
        """Make a scale with a cap."""
        made = super().__new__(cls, scale)
        made.cap = cap
        return made

    def __getnewargs__(self) -> tuple[float, float]:  # copies and pickles keep the cap
        return float(self), self.cap


def with_cap(scale: float, cap: float | None) -> float:
    """Give a scale its cap; None: it has none."""
    return scale if cap is None else CappedScale(scale, cap)


def cap_of(scale: Any) -> float | None:
    """Give the cap of a scale; None where scores are not bent."""
    return scale.cap if isinstance(scale, CappedScale) else None


def capped(scores: Tensor, scale: float) -> Tensor:
    """Bend scores, which are products times the scale, as far as the scale says."""
    if not isinstance(scale, CappedScale):
        return scores
    return (scores / scale.cap).tanh() * scale.cap
