"""What a check found: losses, agreement, copies and speed of each plan, and on what text they were measured.

Values only, so that they can be printed without torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvfold.bench.advise.choice import Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one plan."""

    loss: Loss
    agreement: float  # share of tokens for which the likeliest one is that of the full cache
    stored_bytes: int  # of one passage, when it was folded
    tokens_per_second: float  # of the rows that were read together
    copied: float | None = None  # share of names and numbers; None: not asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was measured of some plans, and on what; why others were left out."""

    measured: Mapping[str, Measured]
    left_out: Mapping[str, str]  # reasons by plan
    adapter_bytes: Mapping[str, int]  # of what was learned for a plan, held once for all caches
    folded: int  # tokens of a passage
    compared: int  # tokens behind them
    passages: int
    source: str
    copying: str  # how copying was asked, or why not

    def as_json(self) -> dict[str, Any]:
        """Say on what it was measured; the plans' own results stand with the plans."""
        said = asdict(self)
        for name in ("measured", "left_out", "adapter_bytes"):
            del said[name]
        return said
