"""none: keep no history, only the sinks and what the floor (`least`) leaves. The lowest row of every table.

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
    """Only the sinks stay, and the newest tokens up to the floor."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        self.refuse_budget("none keeps only the sinks")

    @property
    def budget(self) -> "SinksOnly":
        """Give room for the sinks."""
        return SinksOnly()

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark the newest slots that the floor leaves; without one there is no room, and a layer never asks."""
        return newest(candidates.kv, candidates.slots)


@dataclass(frozen=True, slots=True)
class SinksOnly:
    """A budget that the sinks fill."""

    def slots(self, *, seen: int, pinned: int, slot_bytes: int, token_bytes: int, shares: int) -> int:
        """Count as many slots as there are sinks."""
        return min(pinned, seen)

    def floor(self, *, seen: int, least: int, once: bool) -> int:
        """Count as many slots as the floor says: of a short text everything stays."""
        return min(seen, least)

    def check(self, *, pinned: int) -> None:
        """Accept: it always holds the sinks."""
