"""Ranks: what was learned of one model's layers to write slots in few dimensions, and the layout that uses it.

Of every layer: bases for keys and values, how many dimensions each level keeps of either, and a gate that says which
level a slot is worth. Rates are met exactly: a segment's slots get levels so that together they keep the dimensions
that the rate allows, and no more. It knows where none of this comes from; adapters/ranks.py reads it.

After DynaKV, https://arxiv.org/abs/2603.04411
Ours differs: a rate is met by every segment, layer by layer, where the paper's follows from the loss it was trained by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.encode.lowrank.gate import Gate, dealt
from kvfold.encode.lowrank.part import Deal, Form, LowRankPart
from kvfold.errors import PlanError
from kvfold.memory.kv import KV
from kvfold.memory.part import Part

BasisName: TypeAlias = Literal["mixed", "rotated", "heads", "joint", "rotary"]
Dealing: TypeAlias = Literal["learned", "random", "even"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRanks:
    """One layer: how a slot is written, and what it is worth."""

    form: Form
    gate: Gate
    rates: tuple[float, ...]  # this layer's share of each rate of the model's grid

    @property
    def weight_bytes(self) -> int:
        """Bytes of the maps and the gate."""
        return self.form.weight_bytes + sum(getattr(self.gate, one.name).nbytes for one in fields(self.gate))


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisRanks:
    """All folding layers under one basis."""

    layers: Mapping[int, LayerRanks]
    grid: tuple[float, ...]  # rates of the whole model, growing, at which the layers' rates are known
    trained: bool

    def rate_of(self, layer: int, rate: float) -> float:
        """A layer's own rate when the model's is `rate`: between the two nearest that are known."""
        points, values = (0.0, *self.grid), (0.0, *self.layers[layer].rates)
        above = next((at for at, point in enumerate(points) if point >= rate), len(points) - 1)
        left, right = points[max(above - 1, 0)], points[above]
        share = 1.0 if right == left else (rate - left) / (right - left)
        return min(values[max(above - 1, 0)] * (1 - share) + values[above] * share, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """An adapter of one model: ranks under each basis that it has."""

    bases: Mapping[str, BasisRanks]

    def under(self, basis: str) -> BasisRanks:
        """The ranks of one basis."""
        if basis not in self.bases:
            raise PlanError(
                f"basis={basis!r} was asked for; the adapter has {', '.join(self.bases)}; give one of these"
            )
        return self.bases[basis]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedLayout:
    """The layout of all layers, or of one: a form and a way to deal levels each."""

    forms: Mapping[int, tuple[Form, Deal]]
    learned_bytes: int  # of the maps and gates
    layer: int | None = None

    lossless: ClassVar[bool] = False
    shared_heads: ClassVar[bool] = True

    @property
    def weight_bytes(self) -> int:
        """Held once for all caches of a model: maps, gates, and tables of rotations, which grow with the text."""
        rotations = {id(form.bases.rotary): form.bases.rotary for form, _ in self.forms.values()}
        return self.learned_bytes + sum(one.table_bytes for one in rotations.values() if one is not None)

    def of_layer(self, index: int) -> "RankedLayout":
        """The layout of one layer."""
        return replace(self, layer=index)

    def pack(self, kv: KV, kept: Bool[Tensor, "B H S"]) -> Part:
        """A low-rank part of the slots that are True."""
        form, deal = self._own()
        return LowRankPart.of(kv, kept, deal, form)

    def from_state(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """A low-rank part from what it saved."""
        return LowRankPart.from_state(plain, tensors, self._own()[0])

    def _own(self) -> tuple[Form, Deal]:
        assert self.layer is not None, "a layer's layout packs"
        return self.forms[self.layer]


def check_rate(rate: float) -> None:
    """Refuse a rate that cannot be."""
    if not 0 < rate <= 1:
        raise PlanError(f"rate={rate} was asked for; it is the kept share of all dimensions; give above 0 and up to 1")


def one_level(form: Form, dims: tuple[int, int]) -> tuple[Form, Deal]:
    """All slots in the same dimensions."""
    return replace(form, levels=(dims,)), _first_level


def by_gate(own: LayerRanks, rate: float, dealing: Dealing, *, codes: bool = False) -> tuple[Form, Deal]:
    """Levels by the gate so that a segment keeps `rate` of its numbers; or the same levels dealt at random; or one."""
    form = replace(own.form, codes=codes)
    if dealing == "even":
        return one_level(form, dims_at(form, rate))
    deal = _GateDeal(own, rate)
    return form, _shuffled(deal) if dealing == "random" else deal


def dims_at(form: Form, rate: float) -> tuple[int, int]:
    """Dimensions of keys and values that keep this share of the numbers, on the way between two levels."""
    wanted, parts = round(rate * form.size), form.bases.keys.parts
    for (keys, values), (more_keys, more_values) in zip(form.levels, form.levels[1:], strict=False):
        if wanted <= more_keys + more_values:
            step = more_keys + more_values - keys - values
            added = round((more_keys - keys) * (wanted - keys - values) / step / parts) * parts
            least, most = -((form.levels[-1][1] - wanted) // parts) * parts, wanted // parts * parts
            keys = min(max(keys + added, least), most)  # what the parts share evenly may not push values out of bounds
            return keys, wanted - keys
    return form.levels[-1]


class _GateDeal:
    """Deals levels by a layer's gate within a rate."""

    def __init__(self, own: LayerRanks, rate: float) -> None:
        self.own, self.rate = own, rate

    def __call__(self, keys: Float[Tensor, "S K"], values: Float[Tensor, "S V"],
                 positions: Int[Tensor, " S"]) -> Int[Tensor, " S"]:  # fmt: skip
        logits = self.own.gate.logits(keys, values)
        return dealt(logits, [sum(level) for level in self.own.form.levels], rate=self.rate, size=self.own.form.size)


def _first_level(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return torch.zeros(len(positions), dtype=torch.long, device=positions.device)


def _shuffled(deal: Deal) -> Deal:
    """The same levels for other slots; which ones follows from the first position and their number."""

    def shuffled(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        levels = deal(keys, values, positions)
        source = torch.Generator().manual_seed(int(positions[0]) if len(positions) else 0)
        return levels[torch.randperm(len(levels), generator=source).to(levels.device)]

    return shuffled


def grid_of(rates: Sequence[float]) -> tuple[float, ...]:
    """A growing grid that ends in 1."""
    return tuple(sorted({*rates, 1.0}))
