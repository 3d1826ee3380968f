"""LowRankFormat: how one layer's slots are written: its bases, and how many dimensions each level has.

A level is a number of key dimensions and of value dimensions; both grow with it. A rank allocation gives each slot of a
segment a level. A row is a block of latents for each level, lowest level first; within a block slots are in order of
age. The functions cut, store and flatten blocks. Where heads are written apart a block lies dimension by
dimension (attention/basis.py). Nothing here knows who allocates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.attention.basis import Bases, LatentBlock
from kvfold.attention.bit_planes import BitPlanes
from kvfold.attention.int8 import to_int8
from kvfold.memory.ragged import Counts

Levels: TypeAlias = tuple[tuple[int, int], ...]  # dimensions of keys and of values, growing
# Latents of keys [S, K], of values [S, V] and positions [S] of a row's segment -> the level of each slot [S].
RankAllocation: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankFormat:
    """The bases and levels of one layer."""

    bases: Bases
    levels: Levels
    int8: bool = False  # latents are stored as signed bytes and scales
    planes: tuple[BitPlanes, BitPlanes] | None = None  # or as bit planes of keys and of values; levels count bytes then

    @property
    def size(self) -> int:
        """Count the numbers of a slot in full, keys and values of all heads."""
        return self.bases.keys.mean.shape[0] + self.bases.values.mean.shape[0]  # a mean has a number for each

    @property
    def dims(self) -> list[int]:
        """List the numbers of a slot at each level, keys and values together."""
        if self.planes is not None:
            return [sum(len(planes.order) for planes in self.planes)]
        return [sum(level) for level in self.levels]

    @property
    def scaled(self) -> bool:
        """Tell whether a slot has a scale for its keys and one for its values."""
        return self.int8 or self.planes is not None

    def cut_of(self, level: int) -> tuple[int, int] | None:
        """Give the leading dimensions that a level keeps of a latent; None where bit planes choose them."""
        return None if self.planes is not None else self.levels[level]

    @property
    def parts(self) -> list[int]:
        """Say in how many parts keys and values are written."""
        return [self.bases.keys.parts, self.bases.values.parts]

    @property
    def weight_bytes(self) -> int:
        """Count the bytes of the bases and of how bits are given, which belong to the model and not to a cache."""
        total = 0
        for basis in (self.bases.keys, self.bases.values):
            total += basis.encode.nbytes + basis.decode.nbytes + basis.mean.nbytes
        return total + sum(planes.weight_bytes for planes in self.planes or ())

    def dims_at(self, rate: float) -> tuple[int, int]:
        """Give dimensions of keys and values that keep this share of the numbers, on the way between two levels."""
        wanted = round(rate * self.size)
        parts = self.bases.keys.parts
        all_values = self.levels[-1][1]
        for less, more in pairwise(self.levels):
            if wanted > sum(more):
                continue
            keys, more_keys = less[0], more[0]
            step = sum(more) - sum(less)
            # Of the numbers beyond the lower level keys get the share that they have between the two levels.
            exact = (more_keys - keys) * (wanted - sum(less)) / step
            # Parts share key dimensions evenly, so these grow by a multiple of their number.
            added = round(exact / parts) * parts
            least = -((all_values - wanted) // parts) * parts  # rounded up: values get no more than there are
            most = wanted // parts * parts
            keys = min(max(keys + added, least), most)
            return keys, wanted - keys
        return self.levels[-1]


Blocks = Sequence[LatentBlock]  # of one row, a block for each level


def cut(
    block: LatentBlock,
    kept: Bool[Tensor, " S"],
    dims: tuple[int, int] | None = None,
) -> LatentBlock:
    """Cut a block to the slots that are True, and to the leading `dims` of keys and of values; None: all of them."""
    keys, values = block.keys[kept], block.values[kept]
    if dims is not None:
        # The weightiest dimensions of a latent come first.
        keys, values = keys[:, : dims[0]], values[:, : dims[1]]
    return LatentBlock(
        keys=keys,
        values=values,
        positions=block.positions[kept],
        scales=None if block.scales is None else block.scales[kept],
        planes=block.planes,
    )


def stored(
    block: LatentBlock,
    form: LowRankFormat,
    dtype: torch.dtype,
) -> LatentBlock:
    """Round latents as they are stored: to the model's dtype, or to bytes with a scale a slot and side."""
    if not form.scaled:
        return LatentBlock(
            keys=block.keys.to(dtype),
            values=block.values.to(dtype),
            positions=block.positions,
        )
    if form.planes is None:
        keys, key_scales = to_int8(block.keys)
        values, value_scales = to_int8(block.values)
    else:
        keys, key_scales = form.planes[0].pack(block.keys)
        values, value_scales = form.planes[1].pack(block.values)
    scales = torch.stack([key_scales, value_scales], dim=-1)  # S 2
    return LatentBlock(
        keys=keys,
        values=values,
        positions=block.positions,
        scales=scales,
        planes=form.planes,
    )


def flattened(rows: Sequence[Blocks], form: LowRankFormat) -> dict[str, Any]:
    """Give the flat tensors of a part of these rows, in storages that fit exactly."""
    every = [block for blocks in rows for block in blocks]  # in order of row, then level
    held = [[len(block.positions) for block in blocks] for blocks in rows]
    # Concatenation copies, so no view of the tail or of another part stays alive.
    keys = [form.bases.keys.flattened(block.keys) for block in every]
    values = [form.bases.values.flattened(block.values) for block in every]
    positions = [block.positions for block in every]
    scales = [block.scales for block in every if block.scales is not None]
    tensors = {
        "held": torch.tensor(held, dtype=torch.int32, device=every[0].keys.device),  # B levels
        "keys": torch.cat(keys),
        "values": torch.cat(values),
        "positions": torch.cat(positions),
    }
    if scales:
        tensors["scales"] = torch.cat(scales)  # slots 2
    return tensors


def oldest_first(blocks: Blocks) -> Int[Tensor, " S"]:
    """Order a row's stored slots by position: element i is where the i-th oldest slot is stored."""
    positions = positions_of(blocks)
    return positions.argsort(stable=True)  # slots that a method made may share a position


def positions_of(blocks: Blocks) -> Int[Tensor, " S"]:
    """List the positions of a row's slots, level by level."""
    return torch.cat([block.positions for block in blocks])


def promised(
    sizes: Counts,
    form: LowRankFormat,
) -> dict[str, int]:
    """Count the numbers that each flat tensor has for so many slots of each row and level."""
    of_levels = [sum(level) for level in zip(*sizes, strict=True)]  # over rows
    promised = {"positions": sum(of_levels)}
    if form.scaled:
        promised["scales"] = sum(of_levels)
    for side, name in enumerate(("keys", "values")):
        pairs = zip(of_levels, form.levels, strict=True)
        promised[name] = sum(slots * level[side] for slots, level in pairs)
    return promised
