"""Blocks: the latents of one row and level, and what is done with them: cut, join, store, flatten.

A row of a low-rank part is a block for each level, lowest level first. Within a block slots are in order of age. Where
heads are written apart a block lies dimension by dimension (attention/basis.py), so cutting and joining keep that.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.attention.basis import LatentBlock
from kvfold.attention.int8 import to_int8
from kvfold.encode.lowrank.format import LowRankFormat

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
    )


def joined(blocks: Blocks, form: LowRankFormat) -> LatentBlock:
    """Put the slots of several blocks of one level one after the other."""
    scales = [block.scales for block in blocks if block.scales is not None]
    return LatentBlock(
        keys=form.bases.keys.joined([block.keys for block in blocks]),
        values=form.bases.values.joined([block.values for block in blocks]),
        positions=torch.cat([block.positions for block in blocks]),
        scales=torch.cat(scales) if scales else None,  # none where latents are no bytes
    )


def stored(
    block: LatentBlock,
    form: LowRankFormat,
    dtype: torch.dtype,
) -> LatentBlock:
    """Round latents as they are stored: to the model's dtype, or to signed bytes with a scale a slot and side."""
    if not form.int8:
        return LatentBlock(
            keys=block.keys.to(dtype),
            values=block.values.to(dtype),
            positions=block.positions,
        )
    keys, key_scales = to_int8(block.keys)
    values, value_scales = to_int8(block.values)
    scales = torch.stack([key_scales, value_scales], dim=-1)  # S 2
    return LatentBlock(
        keys=keys,
        values=values,
        positions=block.positions,
        scales=scales,
    )


def flattened(rows: Sequence[Blocks], form: LowRankFormat) -> dict[str, Tensor]:
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
