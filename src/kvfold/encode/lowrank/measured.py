"""Measured ranks: bases of a model's layers, and what the loss minds of each of their dimensions. No training.

A rate is spent where the loss falls most: dimensions of all layers, of keys and of values compete, and every slot of a
layer keeps the same ones. What is stored are falls of the loss and not ranks, so one adapter serves every rate. It
knows where none of this comes from; adapters/measured.py reads it and train/dynakv/calibrate.py measures it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.attention.basis import Bases
from kvfold.attention.bit_planes import BitPlanes, bytes_of
from kvfold.encode.lowrank.bits import allocate_bits
from kvfold.encode.lowrank.format import LowRankFormat
from kvfold.encode.lowrank.layout import RankedLayout, single_level

Cut: TypeAlias = tuple[int, int]  # dimensions of keys and of values that every slot of a layer keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class DimensionLoss:
    """What the divergence from the full model, in nats a token, grows by. X counts dimensions of keys, then values."""

    falls: Float[Tensor, " X"]  # less with each dimension more of its side that all slots keep; never rising
    alone: Float[Tensor, " X"]  # more when this one dimension is left out of all slots
    noise: Float[Tensor, " X"]  # more per square of relative noise that slots have in it independently
    size: Float[Tensor, " X"]  # no loss: the root mean square of the dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLayer:
    """One layer: its bases, and what their dimensions are worth to the loss."""

    bases: Bases
    loss: DimensionLoss

    @property
    def sides(self) -> tuple[int, int]:
        """Count the dimensions of keys and of values."""
        return len(self.bases.keys.mean), len(self.bases.values.mean)

    @property
    def form(self) -> LowRankFormat:
        """Give the format that keeps every dimension."""
        return LowRankFormat(bases=self.bases, levels=(self.sides,))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRanks:
    """All folding layers under one basis."""

    layers: Mapping[int, MeasuredLayer]

    trained: ClassVar[bool] = False

    def cuts(self, rate: float) -> dict[int, Cut]:
        """Share a rate out over layers, keys and values, where the loss falls most (water-filling)."""
        sizes = [size for layer in self.layers.values() for size in layer.sides]
        falls = torch.cat([layer.loss.falls for layer in self.layers.values()])
        ranks = water_filled(falls, sizes, round(rate * len(falls)))
        cuts = {}
        for (index, layer), keys, values in zip(self.layers.items(), ranks[::2], ranks[1::2], strict=True):
            parts = layer.bases.keys.parts  # which share the dimensions of keys evenly
            cuts[index] = (keys // parts * parts, values)
        return cuts

    def layout(self, rate: float, allocation: str = "even", *, int8: bool = False) -> RankedLayout:
        """Give all slots of a layer one rank, whatever `allocation` says: nothing was learned that tells them apart."""
        formats = {}
        for index, cut in self.cuts(rate).items():
            form = replace(self.layers[index].form, int8=int8)
            formats[index] = single_level(form, cut)
        # What is known of the loss has said where to cut, and is not held by a cache.
        learned_bytes = sum(form.weight_bytes for form, _ in formats.values())
        return RankedLayout(formats=formats, learned_bytes=learned_bytes)

    def coded_layout(self, bits: float) -> RankedLayout:
        """Give every dimension of every layer its bits, within `bits` a number on average, scales included."""
        sizes = [size for layer in self.layers.values() for size in layer.sides]
        alone = torch.cat([layer.loss.alone for layer in self.layers.values()])
        noise = torch.cat([layer.loss.noise for layer in self.layers.values()])
        scale_bytes = torch.float16.itemsize * len(sizes)
        wanted = round(bits * len(noise) / 8) - scale_bytes
        widths = allocate_bits(alone, noise, sizes, wanted)
        formats = {}
        for index, keys, values in zip(self.layers, widths[::2], widths[1::2], strict=True):
            layer = self.layers[index]
            of_keys, of_values = layer.loss.size.split(layer.sides)
            form = replace(layer.form, planes=(BitPlanes.of(keys, of_keys), BitPlanes.of(values, of_values)))
            formats[index] = single_level(form, (bytes_of(keys), bytes_of(values)))
        learned_bytes = sum(form.weight_bytes for form, _ in formats.values())
        return RankedLayout(formats=formats, learned_bytes=learned_bytes)

    def even_layout(self, rate: float) -> RankedLayout:
        """Give every slot of a layer the same rank."""
        return self.layout(rate)


def water_filled(falls: Float[Tensor, " dims"], sizes: Sequence[int], wanted: int) -> list[int]:
    """Count, for each of several runs of dimensions, how many are among the `wanted` largest falls of all.

    Falls never rise along a run, and equal ones are taken from the front, so what is taken of a run is its beginning.
    """
    order = falls.argsort(descending=True, stable=True)
    taken = torch.zeros_like(falls, dtype=torch.bool)
    taken[order[:wanted]] = True
    return [int(run.sum()) for run in taken.split(list(sizes))]
