"""none: keep nothing of the history but the sinks. The floor of every table.

Source: the no-history control of https://arxiv.org/abs/2309.17453 taken to its end.
Ours differs: it is a plan like any other, so it runs on the same samples through the same code.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from kvfold.memory.candidates import Candidates
from kvfold.select.base import PerLayerSelect, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing(PerLayerSelect):
    """Only the sinks stay."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        self.refuse_budget("none keeps only the sinks")

    @property
    def budget(self) -> "SinksOnly":
        """Give room for the sinks."""
        return SinksOnly()

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark no slot; a layer without room never asks."""
        return newest(candidates.kv, 0)


@dataclass(frozen=True, slots=True)
class SinksOnly:
    """A budget that the sinks fill."""

    def slots(self, *, seen: int, pinned: int, slot_bytes: int, token_bytes: int, shares: int) -> int:
        """Count as many slots as there are sinks."""
        return min(pinned, seen)

    def check(self, *, pinned: int) -> None:
        """Accept: it always holds the sinks."""
