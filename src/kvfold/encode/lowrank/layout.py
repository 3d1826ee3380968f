"""RankedLayout: how all layers of a model write their slots, each by a format and an allocation of ranks.

It knows neither an adapter nor a plan; whoever makes it says what was learned for it, in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.encode.lowrank.format import LowRankFormat, RankAllocation
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.memory.kv import KV
from kvfold.memory.part import Part

Formats: TypeAlias = Mapping[int, tuple[LowRankFormat, RankAllocation]]  # by layer


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedLayout:
    """The layout of all layers, or of one: a format and a rank allocation each."""

    formats: Formats
    learned_bytes: int  # of the bases and gates
    layer: int | None = None  # None: the layout of all layers, which packs nothing

    lossless: ClassVar[bool] = False
    shared_heads: ClassVar[bool] = True  # a latent is of all heads

    @property
    def weight_bytes(self) -> int:
        """Count what is held once for all caches of a model: bases, gates, and tables of rotations.

        The tables grow with the text.
        """
        rotations = [form.bases.rotary for form, _ in self.formats.values()]
        by_identity = {id(rotary): rotary for rotary in rotations if rotary is not None}  # layers share their table
        table_bytes = sum(rotary.table_bytes for rotary in by_identity.values())
        return self.learned_bytes + table_bytes

    def of_layer(self, index: int) -> "RankedLayout":
        """Give the layout of one layer."""
        return replace(self, layer=index)

    def pack(self, kv: KV, kept: Bool[Tensor, "B H S"]) -> Part:
        """Make a low-rank part of the slots that are True."""
        form, allocate = self._of_its_layer()
        return LowRankPart.of(kv, kept, allocate, form)

    def from_state(
        self,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> Part:
        """Build a low-rank part from its state."""
        return LowRankPart.from_state(plain, tensors, self._of_its_layer()[0])

    def _of_its_layer(self) -> tuple[LowRankFormat, RankAllocation]:
        assert self.layer is not None, "a layer's layout packs"
        return self.formats[self.layer]


def single_level(
    form: LowRankFormat,
    dims: tuple[int, int],
) -> tuple[LowRankFormat, RankAllocation]:
    """Make a format of one level, of these dimensions of keys and values, and the allocation that gives it to all."""
    return replace(form, levels=(dims,)), _first_level


def _first_level(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
) -> Int[Tensor, " S"]:
    """Give every slot the only level."""
    return torch.zeros(len(positions), dtype=torch.long, device=positions.device)
