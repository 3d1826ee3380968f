"""Choice: the rule by which one plan is recommended, a pure function of sizes and losses.

Among the plans that fit, the least mean loss wins. A plan whose mean loss lies within the interval of that one is a
tie, and the tie goes to the fewest bytes. Without any measured loss the stated order decides. It knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The divergence from the full cache in nats a token: the mean over passages, and its 95 % interval."""

    mean: float
    low: float
    high: float  # the bound that a recommendation states


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One plan: what it holds, and what it loses where that was measured."""

    plan: str
    size_bytes: int  # at the context that was asked for
    order: int  # lower is preferred where nothing was measured
    loss: Loss | None = None


def choose(options: Sequence[Option], memory_bytes: float) -> Option | None:
    """Choose the plan to take; None where nothing fits.

    Plans without a measured loss are chosen only where no fitting plan has one.
    """
    fitting = [option for option in options if option.size_bytes <= memory_bytes]
    measured = [(option.loss, option) for option in fitting if option.loss is not None]
    if not measured:
        return min(fitting, key=lambda option: option.order, default=None)
    least, _ = min(measured, key=lambda pair: pair[0].mean)
    tied = [(loss, option) for loss, option in measured if loss.mean <= least.high]
    return min(tied, key=lambda pair: (pair[1].size_bytes, pair[0].mean))[1]
