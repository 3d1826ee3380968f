"""pca: every slot in the same few dimensions, those in which keys and values vary most. No training.

Chang et al., Palu: Compressing KV-Cache with Low-Rank Projection, https://arxiv.org/abs/2407.21118
Ours differs: bases are principal components of measured keys and values, their mean set apart, over all heads of a
layer; by default of keys as they are scored (after rotation), so that the way back is taken into the query.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.encode.base import Learned
from kvfold.encode.lowrank.ranks import BasisName, RankedLayout, Ranks, check_rate, single_level
from kvfold.memory.part import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Pca(Learned):
    """A fixed rank."""

    rate: float = 0.5  # kept share of the dimensions, of keys and of values
    basis: BasisName = "rotated"

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2407.21118"

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def bound(self, ranks: Ranks) -> Layout:
        """The measured bases, cut at the rate."""
        measured = ranks.under(f"{self.basis}-measured" if f"{self.basis}-measured" in ranks.bases else self.basis)
        forms = {}
        for index, own in measured.layers.items():
            sides = (own.form.bases.keys, own.form.bases.values)
            keys, values = (max(round(self.rate * len(side.mean) / side.parts), 1) * side.parts for side in sides)
            forms[index] = single_level(own.form, (keys, values))
        return RankedLayout(formats=forms, learned_bytes=sum(own.form.weight_bytes for own in measured.layers.values()))
