"""pca: store every token in the same few dimensions of a measured basis. No training.

Chang et al., Palu: Compressing KV-Cache with Low-Rank Projection, https://arxiv.org/abs/2407.21118
Ours differs: bases are principal components of measured keys and values over all heads of a layer; where the adapter
knows what the loss minds, a rate is shared out over layers, keys and values by it, else all are cut alike.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.encode.base import Learned
from kvfold.encode.lowrank.ranks import BasisName, Ranks, check_rate
from kvfold.memory.part import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Pca(Learned):
    """A fixed rank."""

    rate: float = 0.5  # kept share of all dimensions of keys and values
    basis: BasisName | None = None  # None: the one that the adapter names, else "rotated"

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2407.21118"

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def bound(self, ranks: Ranks) -> Layout:
        """The measured bases, cut at the rate."""
        measured = ranks.without_gates(self.basis or ranks.default or "rotated")
        return measured.even_layout(self.rate)
