"""DynaKV: a learned rank for every token, stored and attended in that rank.

DynaKV (LUMIA Lab and others): a rank for each token by a learned gate, https://arxiv.org/abs/2603.04411
Ours differs: keys and values share one order of dimensions and one level a token, so no rank is stored beside it; the
gate also sees what each cut would leave out; one adapter serves every rate, which each segment meets exactly, where
the paper has a model for each; by default keys are written as they are scored (after rotation), so nothing is
reconstructed. basis="joint" is the paper's.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.encode.base import Learned
from kvfold.encode.lowrank.ranks import BasisName, Dealing, RankedLayout, Ranks, by_gate, check_rate
from kvfold.memory.part import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class DynaKV(Learned):
    """A rank for every token."""

    rate: float = 0.47  # kept share of all dimensions of keys and values, over tokens and layers
    basis: BasisName = "mixed"
    deal: Dealing = "learned"  # "random" gives the gate's ranks to other tokens, "even" one rank to a layer's tokens
    int8: bool = False  # latents as bytes, with one scale for a slot's keys and one for its values

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2603.04411"

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def bound(self, ranks: Ranks) -> Layout:
        """The adapter's forms, with levels dealt by its gates within the rate."""
        learned = ranks.under(self.basis)
        forms = {
            index: by_gate(own, learned.rate_of(index, self.rate), self.deal, codes=self.int8)
            for index, own in learned.layers.items()
        }
        weights = (own.form if self.deal == "even" else own for own in learned.layers.values())  # no gate is asked then
        return RankedLayout(forms=forms, learned_bytes=sum(own.weight_bytes for own in weights))
