"""Ranks: what was learned of one model's layers to write slots in few dimensions, and the layout that uses it.

Of every layer: bases for keys and values, how many dimensions each level keeps of either, and a gate that says which
level a slot is worth. Rates are met exactly: a segment's slots get levels so that together they keep the dimensions
that the rate allows, and no more. It knows where none of this comes from; adapters/ranks.py reads it.

After DynaKV, https://arxiv.org/abs/2603.04411
Ours differs: a rate is met by every segment, layer by layer, where the paper's follows from the loss it was trained by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.encode.lowrank.format import LowRankFormat, RankAllocation
from kvfold.encode.lowrank.gate import Gate, allocate_ranks
from kvfold.encode.lowrank.layout import RankedLayout, single_level
from kvfold.encode.lowrank.measured import MeasuredRanks
from kvfold.errors import PlanError

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

    def layout(self, rate: float, allocation: AllocationName = "learned", *, int8: bool = False) -> RankedLayout:
        """Give every layer its share of the rate, with levels allocated by its gate."""
        formats = {}
        for index, layer in self.layers.items():
            formats[index] = allocated_by_gate(layer, self.rate_of(index, rate), allocation, int8=int8)
        # Dealt evenly, no gate is asked and none is held.
        weighed = [layer.form if allocation == "even" else layer for layer in self.layers.values()]
        return RankedLayout(formats=formats, learned_bytes=sum(held.weight_bytes for held in weighed))

    def even_layout(self, rate: float) -> RankedLayout:
        """Cut keys and values of every layer at the rate, without a gate."""
        formats = {}
        for index, layer in self.layers.items():
            sides = (layer.form.bases.keys, layer.form.bases.values)
            # Parts share dimensions evenly, and each keeps one at least.
            keys, values = (max(round(rate * len(side.mean) / side.parts), 1) * side.parts for side in sides)
            formats[index] = single_level(layer.form, (keys, values))
        learned_bytes = sum(layer.form.weight_bytes for layer in self.layers.values())
        return RankedLayout(formats=formats, learned_bytes=learned_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """An adapter of one model: ranks under each basis that it has, with gates or as they were measured."""

    bases: Mapping[str, BasisRanks]  # with gates; "NAME-measured" is NAME before it was trained
    measured: Mapping[str, MeasuredRanks] = field(default_factory=dict)
    default: str | None = None  # the basis that is meant where none is named; None: by the member that asks

    def under(self, basis: str) -> BasisRanks | MeasuredRanks:
        """Give the ranks of one basis, those with gates first. Raises PlanError where the adapter has none."""
        return self._first((self.bases.get(basis), self.measured.get(basis)), basis)

    def without_gates(self, basis: str) -> BasisRanks | MeasuredRanks:
        """Give the ranks of one basis as they were before any training. Raises PlanError likewise."""
        before = self.bases.get(f"{basis}-measured")
        return self._first((self.measured.get(basis), before, self.bases.get(basis)), basis)

    def with_losses(self, basis: str | None) -> MeasuredRanks:
        """Give the ranks of one basis with measured losses; None: the default's, or else the first that has them.

        Raises PlanError where the adapter has none.
        """
        named = basis or (self.default if self.default in self.measured else None)
        name = named or next(iter(self.measured), "any")
        if name not in self.measured:
            raise PlanError(
                f"bits by measured loss were asked for (basis={basis!r}); the adapter has no such losses; measure them "
                "by `kvfold train dynakv --steps 0` and give that folder as adapter=..."
            )
        return self.measured[name]

    def _first(self, found: Sequence[BasisRanks | MeasuredRanks | None], basis: str) -> BasisRanks | MeasuredRanks:
        ranks = next((one for one in found if one is not None), None)
        if ranks is None:
            names = ", ".join(dict.fromkeys([*self.bases, *self.measured]))
            raise PlanError(f"basis={basis!r} was asked for; the adapter has {names}; give one of these")
        return ranks


def check_rate(rate: float) -> None:
    """Check that a rate is above 0 and at most 1. Raises PlanError."""
    if not 0 < rate <= 1:
        raise PlanError(f"rate={rate} was asked for; it is the kept share of all dimensions; give above 0 and up to 1")


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


def _shuffled(allocate: RankAllocation) -> RankAllocation:
    """Give the same levels to other slots; which ones follows from the first position and their number."""

    def shuffled(keys: Tensor, values: Tensor, positions: Tensor) -> Int[Tensor, " S"]:
        levels = allocate(keys, values, positions)
        seed = int(positions[0]) if len(positions) else 0  # the same text is shuffled alike every time
        source = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(levels), generator=source)  # on the CPU: the same on every device
        return levels[order.to(levels.device)]

    return shuffled
