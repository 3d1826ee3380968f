"""kvtc: store each dimension of a measured basis in as many bits as the measured loss asks for. No training.

KV Cache Transform Coding for Compact Storage in LLM Inference, https://arxiv.org/abs/2511.01815
Ours differs: the cache stays readable as it lies (no entropy coding: slots can be dropped and fetched by themselves),
bits follow the measured loss and not the reconstruction error, and keys are written before rotation.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.encode.base import Learned
from kvfold.encode.lowrank.ranks import BasisName, Ranks
from kvfold.errors import PlanError
from kvfold.memory.part import Layout

_MOST_BITS = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kvtc(Learned):
    """Bits by dimension."""

    bits: float = 4.0  # stored bits for each number of keys and values, scales included; need not be whole
    basis: BasisName | None = None  # None: the one that the adapter names, or that has losses

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2511.01815"

    def __post_init__(self) -> None:
        if not 0 < self.bits <= _MOST_BITS:
            raise PlanError(f"bits={self.bits} was asked for; a number gets 8 at most; give above 0 and up to 8")

    def bound(self, ranks: Ranks) -> Layout:
        """The measured bases, with bits for each dimension."""
        return ranks.with_losses(self.basis).coded_layout(self.bits)
