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
    some: Bool[Tensor, " S"],
    dims: tuple[int, int] | None = None,
) -> LatentBlock:
    """Pick some slots of a block, and the leading dimensions of keys and values."""
    keys, values = block.keys[some], block.values[some]
    if dims is not None:
        keys, values = keys[:, : dims[0]], values[:, : dims[1]]
    return LatentBlock(
        keys=keys,
        values=values,
        positions=block.positions[some],
        scales=None if block.scales is None else block.scales[some],
    )


def joined(blocks: Blocks, form: LowRankFormat) -> LatentBlock:
    """Put the slots of several blocks of one level one after the other."""
    scales = [block.scales for block in blocks if block.scales is not None]
    return LatentBlock(
        keys=form.bases.keys.joined([block.keys for block in blocks]),
        values=form.bases.values.joined([block.values for block in blocks]),
        positions=torch.cat([block.positions for block in blocks]),
        scales=torch.cat(scales) if scales else None,
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
    scales = torch.stack([key_scales, value_scales], dim=-1)
    return LatentBlock(
        keys=keys,
        values=values,
        positions=block.positions,
        scales=scales,
    )


def flattened(rows: Sequence[Blocks], form: LowRankFormat) -> dict[str, Tensor]:
    """Give the flat tensors of a part of these rows, in storages that fit exactly."""
    every = [block for blocks in rows for block in blocks]
    held = [[len(block.positions) for block in blocks] for blocks in rows]
    tensors = {
        "held": torch.tensor(held, dtype=torch.int32, device=every[0].keys.device),
        "keys": torch.cat([form.bases.keys.flattened(block.keys) for block in every]),
        "values": torch.cat([form.bases.values.flattened(block.values) for block in every]),
        "positions": torch.cat([block.positions for block in every]),
    }
    scales = [block.scales for block in every if block.scales is not None]
    return tensors | ({"scales": torch.cat(scales)} if scales else {})


def oldest_first(blocks: Blocks) -> Int[Tensor, " S"]:
    """Give the order of a row's stored slots that sorts them by position."""
    return positions_of(blocks).argsort(stable=True)


def positions_of(blocks: Blocks) -> Int[Tensor, " S"]:
    """List the positions of a row's slots, level by level."""
    return torch.cat([block.positions for block in blocks])
