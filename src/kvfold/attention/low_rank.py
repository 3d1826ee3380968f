"""Attention over latents: keys and values in few dimensions, and never written out again.

Where the latent is one of the key as it is scored, the map back to keys is taken into the query, once a step; where
it is one of the key before its rotation, keys are written out tile by tile. Values are added up as latents and mapped
back once a query head. Exact up to rounding: what comes out is attention over the slots as the basis reads them back.
One row at a time; kernels/low_rank.py does all rows at once on CUDA, kernels/latents.c a step of decoding on a
processor. It knows tensors and bases only.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor

from kvfold.attention.basis import Bases, Basis, LatentBlock
from kvfold.attention.kernels.cuda import wide_product
from kvfold.attention.partial import Partial
from kvfold.attention.soft_cap import cap_of, capped

# Measured on one thread with 16,384 slots of a 135 M shape; docs/log/dynakv.md has the runs. Keys of all heads take
# 1.09 ms a layer in tiles of 512 slots, 1.00 in tiles of 2,048 or 4,096. Keys that lie dimension by dimension take
# 0.93 ms in tiles of 2,048 and 0.60 in tiles of 16,384: short rows cost more than the processor's cache saves.
_TILE = 2048  # slots that are widened, or written out, at a time
_WIDE_TILE = 16384  # the same where latents lie dimension by dimension
_CUDA_TILE = 65536  # of either on a GPU, where a launch costs more than a cache saves; chosen, not measured
_TOUCHED = (
    1 << 12
)  # numbers from which a tile is read once before its product: below, the read costs more than it saves
_SCORES = 1 << 22  # scores that are held at a time: 16 MiB of float32


class LatentView(NamedTuple):
    """A block as matrix products read it. Its views are made once: each costs as much as a small product."""

    keys: Num[Tensor, "*P key_rank S"]  # of each part; P is left out where there is one
    values: Num[Tensor, "*P S value_rank"]
    slots: int
    block: LatentBlock

    @classmethod
    def of(cls, block: LatentBlock, bases: Bases) -> "LatentView":
        """The views of a block that these bases wrote."""
        if block.planes is not None:  # bytes, which no product reads as they lie
            return cls(block.keys.T, block.values, len(block.positions), block)
        keys = _by_part(block.keys, bases.keys.parts)
        values = _by_part(block.values, bases.values.parts).mT
        if bases.keys.parts == 1:
            keys = keys[0]
        if bases.values.parts == 1:
            values = values[0]
        return cls(keys, values, len(block.positions), block)


def attend_latents(
    queries: Float[Tensor, "G Q D"],
    blocks: Sequence[LatentView],
    bases: Bases,
    *,
    scale: float,
) -> Partial:
    """Attention of one row's queries over all slots of its blocks, as a Partial of one row. There is a slot."""
    query_heads, new, _ = queries.shape
    heads = bases.heads
    wide = torch.promote_types(queries.dtype, torch.float32)
    scaled = queries.to(wide) * scale
    grouped = scaled.unflatten(0, (heads, query_heads // heads))
    packed = grouped.flatten(1, 2)  # H, group x Q, D
    slots = sum(block.slots for block in blocks)
    step = max(_SCORES // (heads * slots), 1)  # query rows of a head at a time
    pieces = [_attend(some, blocks, bases, scale) for some in packed.split(step, dim=1)]
    output, log_sum_exp = pieces[0]
    if len(pieces) > 1:
        output = torch.cat([piece[0] for piece in pieces], dim=1)
        log_sum_exp = torch.cat([piece[1] for piece in pieces], dim=1)
    output = output.reshape(1, query_heads, new, -1)
    log_sum_exp = log_sum_exp.reshape(1, query_heads, new)
    return Partial(output.to(queries.dtype), log_sum_exp)


def _attend(
    queries: Float[Tensor, "H Q D"],
    blocks: Sequence[LatentView],
    bases: Bases,
    scale: float,
) -> tuple[Float[Tensor, "H Q E"], Float[Tensor, "H Q"]]:
    """Output and log-sum-exp of scaled queries, those of a group side by side."""
    heads, new, _ = queries.shape
    values = bases.values
    if bases.rotary is None:
        scores, shift = _absorbed_scores(queries, blocks, bases.keys)
    else:
        scores = _written_scores(queries, blocks, bases)
        shift = None
    if cap_of(scale) is not None:  # a cap bends whole scores, so what all slots share must be in them
        whole = scores if shift is None else scores + shift.view(-1, 1)
        scores, shift = capped(whole, scale), None
    # Rows are those of all heads: [H x Q, S], and one maximum a row keeps the exponentials finite.
    highest = scores.amax(dim=1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(dim=1, keepdim=True)
    latent = _weighted_latents(weights, blocks, values)
    latent = latent / total.view(values.parts, -1, 1)
    heads_of_part = heads // values.parts
    of_heads = latent.unflatten(1, (heads_of_part, -1))
    by_head = of_heads.flatten(0, 1)  # H Q part_rank
    decode = values.decode.to(latent.dtype)
    mean = values.mean.to(latent.dtype)
    output = torch.baddbmm(mean.view(heads, 1, -1), by_head, decode)
    log_sum_exp = total.log() + highest
    log_sum_exp = log_sum_exp.view(heads, new)
    if shift is not None:
        log_sum_exp = log_sum_exp + shift
    return output, log_sum_exp


def _absorbed_scores(
    queries: Float[Tensor, "H Q D"],
    blocks: Sequence[LatentView],
    basis: Basis,
) -> tuple[Float[Tensor, "rows S"], Float[Tensor, "H Q"]]:
    """Scores q . (z decode) as (q decode^T) . z, and q . mean apart from them: it is the same for all slots of a row.

    Rows of the scores are the queries of all heads, head by head.
    """
    heads, parts = len(queries), basis.parts
    decode = basis.decode.to(queries.dtype)  # H part_rank D
    absorbed = torch.bmm(queries, decode.mT)  # H Q part_rank
    mean = basis.mean.to(queries.dtype)
    shift = torch.bmm(queries, mean.view(heads, -1, 1))
    shift = shift[..., 0]  # H Q
    if parts == 1:
        absorbed = absorbed.flatten(0, 1)  # rows part_rank
    else:
        absorbed = absorbed.view(parts, -1, absorbed.shape[-1])  # P, rows of a part, part_rank
    pieces = []
    for block in blocks:
        if block.block.planes is not None:
            pieces += _unpacked_products(absorbed, block, parts)
            continue
        leading = absorbed[..., : block.keys.shape[-2]]
        pieces += _products(leading, block)
    scores = torch.cat(pieces, dim=-1)
    if parts > 1:
        scores = scores.flatten(0, 1)
    blocks_of_bytes = [view.block for view in blocks if view.block.planes is None]
    scales = [block.scales[:, 0] for block in blocks_of_bytes if block.scales is not None]
    if scales:
        scores.mul_(torch.cat(scales).to(scores.dtype))
    return scores, shift


def _products(absorbed: Float[Tensor, "*P rows key_rank"], view: LatentView) -> list[Tensor]:
    """Products of query rows with the latents of a block's keys, [*P, rows, S] in pieces of S."""
    keys = view.keys
    dtype = absorbed.dtype
    if absorbed.device.type == "cuda":
        if view.block.scales is not None:
            keys = keys.to(dtype)
        return [_wide_products(absorbed, keys)]
    one_part = keys.ndim == 2
    step = _TILE if one_part else _WIDE_TILE
    tiles = [keys]
    if view.slots > step:
        tiles = keys.split(step, dim=-1)
    if one_part:
        return [torch.mm(absorbed, _in_cache(tile, dtype)) for tile in tiles]
    return [torch.bmm(absorbed, tile.to(dtype)) for tile in tiles]


def _unpacked_products(
    absorbed: Float[Tensor, "*P rows part_rank"],
    view: LatentView,
    parts: int,
) -> list[Tensor]:
    """Products with latents of keys that are bit planes, which are read back a tile at a time."""
    products = []
    for tile in _tiles(view, absorbed.device):
        keys = _by_part(tile.key_numbers().to(absorbed.dtype), parts)  # P part_rank S
        keys = keys[0] if parts == 1 else keys
        products.append(absorbed[..., : keys.shape[-2]] @ keys)
    return products


def _tiles(view: LatentView, device: torch.device) -> Iterator[LatentBlock]:
    """Cut a block into tiles of slots that are widened together."""
    step = _TILE if device.type == "cpu" else _CUDA_TILE
    for first in range(0, view.slots, step):
        yield view.block.tile(first, first + step)


def _wide_products(absorbed: Tensor, keys: Tensor) -> Tensor:
    """A product in float32 on CUDA, of one part or several."""
    absorbed = absorbed.to(keys.dtype)
    if keys.ndim == 3:
        return wide_product(absorbed, keys)
    return wide_product(absorbed[None], keys[None])[0]


def _written_scores(
    queries: Float[Tensor, "H Q D"],
    blocks: Sequence[LatentView],
    bases: Bases,
) -> Float[Tensor, "rows S"]:
    """Scores by keys that are read back and rotated, a tile at a time."""
    scores = []
    for view in blocks:
        for tile in _tiles(view, queries.device):
            keys = bases.read_keys(tile)  # S H D
            keys = keys.to(queries.dtype)
            by_head = torch.bmm(queries, keys.permute(1, 2, 0))  # H Q S
            scores.append(by_head.flatten(0, 1))
    return torch.cat(scores, dim=1)


def _weighted_latents(
    weights: Float[Tensor, "rows S"],
    blocks: Sequence[LatentView],
    basis: Basis,
) -> Float[Tensor, "P part_rows part_rank"]:
    """Latents of values, added up by weight; in bfloat16, and in float16 on CUDA, products are of them as stored."""
    one_part, is_cuda = basis.parts == 1, weights.device.type == "cuda"
    if not one_part:
        weights = weights.unflatten(0, (basis.parts, -1))
    part_rank = basis.decode.shape[1]
    latent = weights.new_zeros(*weights.shape[:-1], part_rank)
    add_product = Tensor.addmm_ if one_part else Tensor.baddbmm_
    of_blocks = weights.split([view.slots for view in blocks], dim=-1)
    for block_weights, view in zip(of_blocks, blocks, strict=True):
        if view.block.planes is not None:
            _add_unpacked(latent, block_weights, view, basis.parts)
            continue
        values = view.values
        leading = latent[..., : values.shape[-1]]  # a block adds to as many dimensions as it keeps
        scales = view.block.scales
        # Weights that are not divided by their total yet may add up to more than float16 holds.
        overflows = values.dtype == torch.float16 and not is_cuda
        if scales is not None or overflows:
            scaled = block_weights if scales is None else block_weights * scales[:, 1].to(weights.dtype)
            step = _CUDA_TILE if is_cuda else _TILE
            tiles = values.split(step, dim=-2)
            for some, tile in zip(scaled.split(step, dim=-1), tiles, strict=True):
                add_product(leading, some, tile.to(weights.dtype))
        elif is_cuda and values.dtype != weights.dtype:
            leading.add_(_wide_products(block_weights, values))
        elif values.dtype != weights.dtype:
            narrow = block_weights.to(values.dtype)
            leading.add_(narrow @ values)
        elif one_part:
            add_product(leading, block_weights, _in_cache(values, weights.dtype))
        else:
            add_product(leading, block_weights, values)
    return latent[None] if one_part else latent


def _add_unpacked(
    latent: Float[Tensor, "*P part_rows part_rank"],
    weights: Float[Tensor, "*P part_rows S"],
    view: LatentView,
    parts: int,
) -> None:
    """Add up latents of values that are bit planes, which are read back a tile at a time."""
    first = 0
    for tile in _tiles(view, weights.device):
        values = _by_part(tile.value_numbers().to(weights.dtype), parts).mT  # P S part_rank
        values = values[0] if parts == 1 else values
        last = first + len(tile.positions)
        latent[..., : values.shape[-1]] += weights[..., first:last] @ values
        first = last


def _by_part(latents: Num[Tensor, "S R"], parts: int) -> Num[Tensor, "P part_rank S"]:
    """Latents of each part; a view. Parts take turns in a latent, so its dimensions are [part_rank, P]."""
    by_dimension = latents.T  # R S
    turns = by_dimension.unflatten(0, (-1, parts))  # part_rank P S
    return turns.transpose(0, 1)


def _in_cache(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """A tile in the dtype of the product, and in the processor's cache: the product itself reads it across its rows."""
    if tile.dtype != dtype:
        return tile.to(dtype)
    if tile.device.type == "cpu" and tile.numel() > _TOUCHED:
        tile.amax()  # reads it in memory order; a product over untouched tiles takes 1.47 times as long
    return tile
