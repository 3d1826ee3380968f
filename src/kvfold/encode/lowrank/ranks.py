"""Ranks: what was learned of one model's layers to write slots in few dimensions, and the layout that uses it.

Of every layer: bases for keys and values, how many dimensions each level keeps of either, and a gate that says which
level a slot is worth. Rates are met exactly: a segment's slots get levels so that together they keep the dimensions
that the rate allows, and no more. It knows where none of this comes from; adapters/ranks.py reads it.

After DynaKV, https://arxiv.org/abs/2603.04411
Ours differs: a rate is met by every segment, layer by layer, where the paper's follows from the loss it was trained by.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.encode.lowrank.format import LowRankFormat, RankAllocation
from kvfold.encode.lowrank.gate import Gate, allocate_ranks
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.errors import PlanError
from kvfold.memory.kv import KV
from kvfold.memory.part import Part

BasisName: TypeAlias = Literal["mixed", "rotated", "heads", "joint", "rotary"]
AllocationName: TypeAlias = Literal["learned", "random", "even"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRanks:
    """One layer: how a slot is written, and the gate that says which level a slot gets."""

    form: LowRankFormat
    gate: Gate
    rates: tuple[float, ...]  # this layer's share of each rate of the model's grid

    @property
    def weight_bytes(self) -> int:
        """Count the bytes of the bases and the gate."""
        tensors = self.gate.parameters().values()
        gate_bytes = sum(tensor.nbytes for tensor in tensors)
        return self.form.weight_bytes + gate_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisRanks:
    """All folding layers under one basis."""

    layers: Mapping[int, LayerRanks]
    grid: tuple[float, ...]  # rates of the whole model, growing, at which the layers' rates are known
    trained: bool

    def rate_of(self, layer: int, rate: float) -> float:
        """Give a layer's rate when the model's is `rate`: between the two nearest that are known."""
        points = (0.0, *self.grid)  # at rate 0 nothing is kept in any layer
        values = (0.0, *self.layers[layer].rates)
        at_least = [index for index, point in enumerate(points) if point >= rate]
        above = at_least[0] if at_least else len(points) - 1
        below = max(above - 1, 0)
        left, right = points[below], points[above]
        # Beyond the last point the share is above 1: the line goes on, up to a rate of 1.
        share = 1.0 if right == left else (rate - left) / (right - left)
        between = values[below] * (1 - share) + values[above] * share
        return min(between, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """An adapter of one model: ranks under each basis that it has."""

    bases: Mapping[str, BasisRanks]

    def under(self, basis: str) -> BasisRanks:
        """Give the ranks of one basis. Raises PlanError where the adapter has none."""
        if basis not in self.bases:
            raise PlanError(
                f"basis={basis!r} was asked for; the adapter has {', '.join(self.bases)}; give one of these"
            )
        return self.bases[basis]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedLayout:
    """The layout of all layers, or of one: a format and a rank allocation each."""

    formats: Mapping[int, tuple[LowRankFormat, RankAllocation]]
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


def check_rate(rate: float) -> None:
    """Check that a rate is above 0 and at most 1. Raises PlanError."""
    if not 0 < rate <= 1:
        raise PlanError(f"rate={rate} was asked for; it is the kept share of all dimensions; give above 0 and up to 1")


def single_level(
    form: LowRankFormat,
    dims: tuple[int, int],
) -> tuple[LowRankFormat, RankAllocation]:
    """Make a format of one level, of these dimensions of keys and values, and the allocation that gives it to all."""
    return replace(form, levels=(dims,)), _first_level


def allocated_by_gate(
    ranks: LayerRanks,
    rate: float,
    allocation: AllocationName,
    *,
    int8: bool = False,
) -> tuple[LowRankFormat, RankAllocation]:
    """Allocate ranks by the gate (meets `rate` exactly), shuffled over the slots (ablation), or uniform."""
    form = replace(ranks.form, int8=int8)
    if allocation == "even":
        return single_level(form, form.dims_at(rate))
    by_gate = _GateAllocation(ranks, rate)
    return form, _shuffled(by_gate) if allocation == "random" else by_gate


class _GateAllocation:
    """Allocates levels by a layer's gate within a rate."""

    def __init__(self, ranks: LayerRanks, rate: float) -> None:
        self.ranks, self.rate = ranks, rate

    def __call__(
        self,
        keys: Float[Tensor, "S K"],
        values: Float[Tensor, "S V"],
        positions: Int[Tensor, " S"],
    ) -> Int[Tensor, " S"]:
        form = self.ranks.form
        logits = self.ranks.gate.logits(keys, values)
        return allocate_ranks(logits, form.dims, rate=self.rate, size=form.size)


def _first_level(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
) -> Int[Tensor, " S"]:
    """Give every slot the only level."""
    return torch.zeros(len(positions), dtype=torch.long, device=positions.device)


def _shuffled(allocate: RankAllocation) -> RankAllocation:
    """Give the same levels to other slots; which ones follows from the first position and their number."""

    def shuffled(keys: Tensor, values: Tensor, positions: Tensor) -> Int[Tensor, " S"]:
        levels = allocate(keys, values, positions)
        seed = int(positions[0]) if len(positions) else 0  # the same text is shuffled alike every time
        source = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(levels), generator=source)  # on the CPU: the same on every device
        return levels[order.to(levels.device)]

    return shuffled
