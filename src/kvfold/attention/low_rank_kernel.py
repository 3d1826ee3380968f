"""Attention of a few queries over latents in one launch for all rows and levels: a Triton kernel, for CUDA.

Each row's slots are shared out over programs; a program goes through its slots of every level, keeps a running softmax
(Milakov and Gimelshein, https://arxiv.org/abs/1805.02867) and the latents of values it adds up, and the programs'
answers are merged. What is read is what is stored: no block is padded, widened or joined in memory. For keys in one
part or more, values in one part, and no rotation; latent.py does the rest, and is what this must agree with.
"""

# pyright: reportInvalidTypeForm=false

import inspect
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from kvfold.attention.low_rank import Bases
from kvfold.attention.partial import Partial


def _module(name: str) -> Any:
    """A module that comes with torch where there is CUDA; None elsewhere."""
    try:
        return import_module(name)
    except ImportError:
        return None


triton, tl = _module("triton"), _module("triton.language")
constexpr: Any = int if tl is None else tl.constexpr  # triton knows it by this name

MOST_ROWS = 64  # query rows that a program holds
_SPLIT_SLOTS = 512  # slots that are worth a program
_PROGRAMS = 264  # two for every multiprocessor of a large card
HALVES = (torch.bfloat16, torch.float16)


def fits(queries: Float[Tensor, "B G Q D"], bases: Bases) -> bool:
    """Whether these queries can go through the kernel here."""
    return (
        queries.device.type == "cuda"
        and queries.dtype in HALVES
        and queries.shape[1] * queries.shape[2] <= MOST_ROWS
        and bases.rotary is None
        and bases.values.parts == 1
        and triton is not None
    )


def attend_rows(
    queries: Float[Tensor, "B G Q D"],
    bases: Bases,
    *,
    keys: Num[Tensor, " key_numbers"],
    values: Num[Tensor, " value_numbers"],
    scales: Float[Tensor, "tokens 2"] | None,
    held: Int[Tensor, "B levels"],
    dims: Int[Tensor, "levels 2"],
    slots: int,
    scale: float,
) -> Partial:
    """Attention of every row over its slots, stored flat in order of row, level, slot; `slots` is the most a row has.

    `held` are slots of each row and level, `dims` dimensions of keys and values of each level.
    """
    rows, heads, size = queries.shape[0], bases.heads, queries.shape[-1]
    asked = (queries.float() * scale).reshape(rows, heads, -1, size)  # B H n D
    inside = torch.einsum("bhnd,hrd->bhnr", asked, bases.keys.decode.float())
    shift = torch.einsum("bhnd,hd->bhn", asked, bases.keys.mean.float().view(heads, size))
    number, rank = asked.shape[2] * heads, bases.values.decode.shape[1]
    splits = max(1, min(-(-slots // _SPLIT_SLOTS), -(-_PROGRAMS // rows)))
    latents = torch.empty(rows, splits, number, rank, dtype=torch.float32, device=queries.device)
    weights = torch.empty(rows, splits, number, dtype=torch.float32, device=queries.device)
    wide = _power(inside.shape[-1]), _power(rank)
    asked = inside.reshape(rows, number, -1).to(queries.dtype).contiguous()
    _KERNEL[(splits, rows)](
        asked, keys, values, keys if scales is None else scales, held, dims, latents, weights, number,
        inside.shape[-1], rank, splits,
        LEVELS=held.shape[1], PARTS=bases.keys.parts, ROWS=max(_power(number), 16), PER_PART=number // bases.keys.parts,
        KEYS=wide[0], VALUES=wide[1], TILE=64 if sum(wide) <= 512 else 32, CODES=scales is not None,
        num_warps=4 if sum(wide) <= 256 else 8, num_stages=2 if sum(wide) <= 512 else 1,
    )  # fmt: skip
    whole = weights.logsumexp(dim=1)  # B n
    shares = (weights - whole[:, None].clamp(min=torch.finfo(whole.dtype).min)).exp()
    latent = (latents * shares[..., None]).sum(dim=1).view(rows, heads, -1, rank)
    output = torch.einsum("bhnr,hre->bhne", latent, bases.values.decode.float())
    output = output + bases.values.mean.float().view(heads, 1, -1)
    log_sum_exp = whole.view(rows, heads, -1) + shift
    shape = queries.shape[:3]
    return Partial(output.reshape(*shape, -1).to(queries.dtype), log_sum_exp.reshape(shape))


def _power(number: int) -> int:
    """The next power of two, 16 or more."""
    return max(16, 1 << (number - 1).bit_length())


def _latents(asked, keys, values, scales, held, dims, latents, weights, number, rank_keys, rank_values, splits,
             LEVELS: constexpr, PARTS: constexpr, ROWS: constexpr, PER_PART: constexpr,
             KEYS: constexpr, VALUES: constexpr, TILE: constexpr, CODES: constexpr):  # fmt: skip
    """One program: its share of one row's slots. Queries are padded to ROWS, dimensions to KEYS and VALUES."""
    split, row = tl.program_id(0), tl.program_id(1)
    rows, of_keys, of_values = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, VALUES)
    at_keys, at_values, at_slots = tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for entry in range(row * LEVELS):
        count = tl.load(held + entry).to(tl.int64)
        at_keys += count * tl.load(dims + entry % LEVELS * 2)
        at_values += count * tl.load(dims + entry % LEVELS * 2 + 1)
        at_slots += count
    query = tl.load(asked + (row * number + rows[:, None]) * rank_keys + of_keys[None],
                    mask=(rows[:, None] < number) & (of_keys[None] < rank_keys), other=0.0)  # fmt: skip
    highest, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, VALUES), tl.float32)
    for level in range(LEVELS):
        count = tl.load(held + row * LEVELS + level).to(tl.int64)
        few_keys, few_values = tl.load(dims + level * 2) // PARTS, tl.load(dims + level * 2 + 1)
        for first in range(split * TILE, count, splits * TILE):
            slots = first + tl.arange(0, TILE).to(tl.int64)
            there = slots < count
            scores = tl.zeros((ROWS, TILE), tl.float32)
            for part in tl.static_range(PARTS):
                if PARTS == 1:
                    where = slots[None] * few_keys + of_keys[:, None]
                else:
                    where = (of_keys[:, None] * PARTS + part) * count + slots[None]
                some = tl.load(keys + at_keys + where, mask=(of_keys[:, None] < few_keys) & there[None], other=0)
                own = tl.dot(query, some.to(query.dtype))
                scores = tl.where((rows // PER_PART == part)[:, None], own, scores)
            if CODES:
                size = tl.load(scales + (at_slots + slots) * 2, mask=there, other=0.0).to(tl.float32)
                scores *= size[None]
            scores = tl.where(there[None], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            fade = tl.exp(highest - higher)
            weight = tl.exp(scores - higher[:, None])
            total = total * fade + tl.sum(weight, axis=1)
            if CODES:
                size = tl.load(scales + (at_slots + slots) * 2 + 1, mask=there, other=0.0).to(tl.float32)
                weight *= size[None]
            some = tl.load(values + at_values + slots[:, None] * few_values + of_values[None],
                           mask=there[:, None] & (of_values[None] < few_values), other=0)  # fmt: skip
            summed = summed * fade[:, None] + tl.dot(weight.to(query.dtype), some.to(query.dtype))
            highest = higher
        at_keys += count * few_keys * PARTS
        at_values += count * few_values
        at_slots += count
    into = ((row * splits + split) * number + rows).to(tl.int64)
    some = total > 0
    output = summed / tl.where(some, total, 1.0)[:, None]
    tl.store(latents + into[:, None] * rank_values + of_values[None], output,
             mask=(rows[:, None] < number) & (of_values[None] < rank_values))  # fmt: skip
    tl.store(weights + into, tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), float("-inf")),
             mask=rows < number)  # fmt: skip


_KERNEL: Any = None if triton is None else triton.jit(inspect.unwrap(_latents))
