"""Attention of a few queries over latents in one launch for all rows and levels: a Triton kernel, for CUDA.

Each row's slots are shared out over programs; a program goes through its slots of every level, keeps a running softmax
(Milakov and Gimelshein, https://arxiv.org/abs/1805.02867) and the latents of values it adds up, and the programs'
answers are merged. What is read is what is stored: no block is padded, widened or joined in memory. For keys in one
part or more, values in one part, and no rotation; ../low_rank.py does the rest, and is what this must agree with.
"""

# pyright: reportInvalidTypeForm=false

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from kvfold.attention.basis import Bases
from kvfold.attention.kernels.programs import (
    MOST_ROWS,
    PROGRAMS,
    constexpr,
    jit,
    launches,
    merged,
    padded,
    room_for_answers,
    softmax_step,
    store,
    tl,
)
from kvfold.attention.partial import Partial
from kvfold.attention.soft_cap import cap_of

HALVES = (torch.bfloat16, torch.float16)
_SPLIT_SLOTS = 512  # slots of a row for each program, at least
_NARROW = 256  # padded dimensions of keys and values together up to which four warps hold a program
_MEDIUM = 512  # up to which tiles of 64 slots fit twice into shared memory


def fits(queries: Float[Tensor, "B G Q D"], bases: Bases, scale: float) -> bool:
    """Whether these queries can go through the kernel here; it bends no scores."""
    return (
        queries.device.type == "cuda"
        and queries.dtype in HALVES
        and queries.shape[1] * queries.shape[2] <= MOST_ROWS
        and bases.rotary is None
        and bases.values.parts == 1
        and launches()
        and cap_of(scale) is None
    )


def attend_rows(
    queries: Float[Tensor, "B G Q D"],
    bases: Bases,
    *,
    keys: Num[Tensor, " key_numbers"],
    values: Num[Tensor, " value_numbers"],
    scales: Float[Tensor, "tokens 2"] | None,
    held: Int[Tensor, "B levels"],
    room: Int[Tensor, "B levels"],
    dims: Int[Tensor, "levels 2"],
    slots: int,
    scale: float,
) -> Partial:
    """Attention of every row over its slots, stored flat in order of row, level, slot; `slots` is the most a row has.

    `held` are slots of each row and level, `room` those that its block has room for, `dims` dimensions of keys and
    values of each level.
    """
    rows, query_heads, new, size = queries.shape
    heads = bases.heads
    scaled = (queries.float() * scale).reshape(rows, heads, -1, size)  # B, H, group x Q, D
    absorbed = torch.einsum("bhnd,hrd->bhnr", scaled, bases.keys.decode.float())
    mean = bases.keys.mean.float().view(heads, size)
    shift = torch.einsum("bhnd,hd->bhn", scaled, mean)  # of all slots alike, so the kernel leaves it out
    latents, weights = _launch(
        absorbed.flatten(1, 2).to(queries.dtype).contiguous(),
        bases,
        keys=keys,
        values=values,
        scales=scales,
        held=held,
        room=room,
        dims=dims,
        splits=_splits(slots, rows),
    )
    latent, total = merged(latents, weights)
    latent = latent.view(rows, heads, -1, latent.shape[-1])
    output = torch.einsum("bhnr,hre->bhne", latent, bases.values.decode.float())
    mean = bases.values.mean.float()
    output = output + mean.view(heads, 1, -1)
    log_sum_exp = total.view(rows, heads, -1) + shift
    return Partial(
        output.reshape(rows, query_heads, new, -1).to(queries.dtype),
        log_sum_exp.reshape(rows, query_heads, new),
    )


def _splits(slots: int, rows: int) -> int:
    """Programs of a row of so many slots, where as many rows share the card."""
    wanted = -(-slots // _SPLIT_SLOTS)  # rounded up
    room = -(-PROGRAMS // rows)
    return max(min(wanted, room), 1)


def _launch(
    absorbed: Float[Tensor, "B query_rows part_rank"],
    bases: Bases,
    *,
    keys: Num[Tensor, " key_numbers"],
    values: Num[Tensor, " value_numbers"],
    scales: Float[Tensor, "tokens 2"] | None,
    held: Int[Tensor, "B levels"],
    room: Int[Tensor, "B levels"],
    dims: Int[Tensor, "levels 2"],
    splits: int,
) -> tuple[Float[Tensor, "B splits query_rows value_rank"], Float[Tensor, "B splits query_rows"]]:
    """Run the kernel: latents of values and log-sum-exp of each query row, from every split of a row's slots."""
    rows, query_rows, key_rank = absorbed.shape
    value_rank = bases.values.decode.shape[1]
    latents, weights = room_for_answers(absorbed, splits, value_rank)
    with torch.cuda.device_of(absorbed):  # triton launches on the current card, not on that of its tensors
        _attend[(splits, rows)](
            absorbed,
            keys,
            values,
            keys if scales is None else scales,  # a pointer that is not read
            held,
            room,
            dims,
            latents,
            weights,
            query_rows,
            key_rank,
            value_rank,
            splits,
            LEVELS=held.shape[1],
            PARTS=bases.keys.parts,
            ROWS=padded(query_rows),
            PER_PART=query_rows // bases.keys.parts,
            KEYS=padded(key_rank),
            VALUES=padded(value_rank),
            INT8=scales is not None,
            **_tuned(padded(key_rank) + padded(value_rank)),
        )
    return latents, weights


def _tuned(width: int) -> dict[str, int]:
    """Slots of a tile, warps and pipeline stages by which programs of so many padded dimensions fit a card."""
    if width <= _NARROW:
        return {"TILE": 64, "num_warps": 4, "num_stages": 2}
    if width <= _MEDIUM:
        return {"TILE": 64, "num_warps": 8, "num_stages": 2}
    return {"TILE": 32, "num_warps": 8, "num_stages": 1}


@jit
def _attend(queries, keys, values, scales, held, room, dims, latents, weights, query_rows, key_rank, value_rank,
            splits, LEVELS: constexpr, PARTS: constexpr, ROWS: constexpr, PER_PART: constexpr,
            KEYS: constexpr, VALUES: constexpr, TILE: constexpr, INT8: constexpr):  # fmt: skip
    """One program: its share of one row's slots. Queries are padded to ROWS, dimensions to KEYS and VALUES."""
    split = tl.program_id(0)
    row = tl.program_id(1)
    query_row = tl.arange(0, ROWS)
    key_dim = tl.arange(0, KEYS)
    value_dim = tl.arange(0, VALUES)
    query = _queries(queries, row, query_row, query_rows, key_dim, key_rank)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, VALUES), tl.float32)
    key_start, value_start, slot_start = _row_start(room, dims, row, LEVELS)
    for level in range(LEVELS):
        count = tl.load(held + row * LEVELS + level)
        count = count.to(tl.int64)
        space = tl.load(room + row * LEVELS + level)
        space = space.to(tl.int64)
        key_dims = tl.load(dims + level * 2)
        value_dims = tl.load(dims + level * 2 + 1)
        for first in range(split * TILE, count, splits * TILE):
            slot = first + tl.arange(0, TILE).to(tl.int64)
            scores = _scores(query, keys + key_start, scales + slot_start * 2, slot, count, space, key_dims // PARTS,
                             key_dim, query_row, ROWS, TILE, PARTS, PER_PART, INT8)  # fmt: skip
            weight, fade, highest, total = softmax_step(scores, highest, total)
            gained = _weighted_values(weight, values + value_start, scales + slot_start * 2, slot, count, value_dims,
                                      value_dim, query.dtype, INT8)  # fmt: skip
            summed = summed * fade[:, None] + gained
        key_start += space * key_dims
        value_start += space * value_dims
        slot_start += space
    program = row * splits + split
    answer = program * query_rows + query_row
    real = query_row < query_rows
    stored = value_dim < value_rank
    store(latents, weights, answer, real, value_dim, value_rank, stored, highest, total, summed)


@jit
def _queries(queries, row, query_row, query_rows, key_dim, key_rank):
    """A row's queries [ROWS, KEYS], with zeros in the padding."""
    place = (row * query_rows + query_row[:, None]) * key_rank
    place += key_dim[None]
    real = query_row[:, None] < query_rows
    real &= key_dim[None] < key_rank
    return tl.load(queries + place, mask=real, other=0.0)


@jit
def _row_start(room, dims, row, LEVELS: constexpr):
    """Where a row's keys, values and slots begin: after the room of every level of every earlier row.

    Places are int64: a batch of long rows holds more than 2^31 numbers.
    """
    key_start = tl.zeros((), tl.int64)
    value_start = tl.zeros((), tl.int64)
    slot_start = tl.zeros((), tl.int64)
    for entry in range(row * LEVELS):
        level = entry % LEVELS
        space = tl.load(room + entry).to(tl.int64)
        key_dims = tl.load(dims + level * 2)
        value_dims = tl.load(dims + level * 2 + 1)
        key_start += space * key_dims
        value_start += space * value_dims
        slot_start += space
    return key_start, value_start, slot_start


@jit
def _scores(query, keys, scales, slot, count, space, key_dims, key_dim, query_row,
            ROWS: constexpr, TILE: constexpr, PARTS: constexpr, PER_PART: constexpr, INT8: constexpr):  # fmt: skip
    """Scores [ROWS, TILE] of a tile of slots, each query row by the latent of its part; -inf past the last slot."""
    exists = slot < count
    stored = key_dim[:, None] < key_dims
    mask = stored & exists[None]
    scores = tl.zeros((ROWS, TILE), tl.float32)
    for part in tl.static_range(PARTS):
        if PARTS == 1:
            # Slot by slot.
            place = slot[None] * key_dims + key_dim[:, None]
        else:
            # Dimension by dimension, in which parts take turns.
            turn = key_dim[:, None] * PARTS + part
            place = turn * space + slot[None]
        tile = tl.load(keys + place, mask=mask, other=0)
        product = tl.dot(query, tile.to(query.dtype))
        of_part = query_row // PER_PART == part
        scores = tl.where(of_part[:, None], product, scores)
    if INT8:
        key_scales = tl.load(scales + slot * 2, mask=exists, other=0.0)
        key_scales = key_scales.to(tl.float32)
        scores *= key_scales[None]
    return tl.where(exists[None], scores, float("-inf"))


@jit
def _weighted_values(weight, values, scales, slot, count, value_dims, value_dim, DTYPE: constexpr, INT8: constexpr):
    """Latents of the values of a tile of slots, added up by weight, [ROWS, VALUES]."""
    exists = slot < count
    if INT8:
        value_scales = tl.load(scales + slot * 2 + 1, mask=exists, other=0.0)
        value_scales = value_scales.to(tl.float32)
        weight *= value_scales[None]
    place = slot[:, None] * value_dims + value_dim[None]
    stored = value_dim[None] < value_dims
    mask = exists[:, None] & stored
    tile = tl.load(values + place, mask=mask, other=0)
    return tl.dot(weight.to(DTYPE), tile.to(DTYPE))
