"""DynaKV: store each token in a learned rank of its own, and attend in that rank.

DynaKV (LUMIA Lab and others): a rank for each token by a learned gate, https://arxiv.org/abs/2603.04411
Ours differs: keys and values share one order of dimensions and one level a token, so no rank is stored beside it; the
gate also sees what each cut would leave out; one adapter serves every rate, which each segment meets exactly, where
the paper has a model for each; without training a rate is shared out over layers and sides by measured loss. Keys are
written before rotation (basis="joint", the paper's) or as they are scored, so that nothing is reconstructed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from kvfold.encode.base import Learned
from kvfold.encode.lowrank.ranks import AllocationName, BasisName, Ranks, check_rate
from kvfold.memory.part import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class DynaKV(Learned):
    """A rank for every token."""

    rate: float = 0.47  # kept share of all dimensions of keys and values, over tokens and layers
    basis: BasisName | None = None  # None: the one that the adapter names, else "mixed"
    allocation: AllocationName = "learned"  # "random" shuffles the gate's ranks, "even" gives all tokens one rank
    int8: bool = False  # latents as bytes, with one scale for a slot's keys and one for its values

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2603.04411"
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({"deal": "allocation"})

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def bound(self, ranks: Ranks) -> Layout:
        """Take the adapter's formats, with levels allocated by its gates within the rate; evenly where it has none."""
        learned = ranks.under(self.basis or ranks.default or "mixed")
        return learned.layout(self.rate, self.allocation, int8=self.int8)
