"""Attention over latents: keys and values in few dimensions, and never written out again.

A basis turns the numbers of all heads of a slot into a latent and back: of all heads together, or part by part. Where
the latent is one of the key as it is scored, the map back is taken into the query, once a step; where it is one of
the key before its rotation, keys are written out tile by tile. Values are added up as latents and mapped back once a
query head. Exact up to rounding: what comes out is attention over the slots as the basis reads them back. One row at
a time; it knows tensors only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from kvfold.attention.cuda import wide_product
from kvfold.attention.partial import Partial
from kvfold.attention.rotary import Rotary, rotate, unrotate

_TILE = 2048  # slots that are widened, or written out, at a time
_WIDE_TILE = 16384  # the same where they lie dimension by dimension: short rows cost more than the cache saves
_CUDA_TILE = 65536  # of either where a launch costs more than a cache saves
_SMALL = 1 << 12  # numbers below which touching them first costs more than it saves
_SCORES = 1 << 22  # scores that are held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """A linear way into a latent and back, weightiest dimensions first: z = (x - mean) encode, x = z decode + mean.

    Heads that follow each other and share a map are a part. Dimensions of the parts take turns in a latent (first of
    each, second of each), so a prefix of a multiple of P dimensions keeps equally many of every part.
    """

    encode: Float[Tensor, "P x r"]  # x: the numbers of a part's heads of a slot, head by head; P times x are X
    decode: Float[Tensor, "H r D"]  # the way back to each head out of its part's latent
    mean: Float[Tensor, " X"]

    @property
    def parts(self) -> int:
        """Groups of heads with a map of their own."""
        return self.encode.shape[0]

    def write(self, numbers: Float[Tensor, "S X"]) -> Float[Tensor, "S R"]:
        """Latents, in float32 or wider."""
        wide = torch.promote_types(numbers.dtype, torch.float32)
        about = numbers.to(wide) - self.mean.to(wide)
        parts = about.reshape(len(about), *self.encode.shape[:2]).transpose(0, 1)  # P S x
        return _in_turn(torch.matmul(parts, self.encode.to(wide)))

    def slopes(self, slopes: Float[Tensor, "S X"]) -> Float[Tensor, "S R"]:
        """From slopes to the numbers, the slopes to the latent."""
        heads = slopes.reshape(len(slopes), len(self.decode), -1).transpose(0, 1)  # H S D
        each = torch.matmul(heads, self.decode.to(slopes.dtype).mT)
        return _in_turn(each.unflatten(0, (self.parts, -1)).sum(dim=1))

    def read(self, latents: Float[Tensor, "S some"]) -> Float[Tensor, "S X"]:
        """The numbers that the leading dimensions stand for, in float32 or wider."""
        wide = torch.promote_types(latents.dtype, torch.float32)
        some = latents.shape[1] // self.parts
        parts = latents.to(wide).reshape(len(latents), some, self.parts).permute(2, 0, 1)  # P S some
        back = self.decode[:, :some].to(wide).unflatten(0, (self.parts, -1))
        numbers = torch.matmul(parts, back.transpose(1, 2).flatten(2))  # P S x
        return numbers.transpose(0, 1).flatten(1) + self.mean.to(wide)

    def flattened(self, latents: Num[Tensor, "S some"]) -> Num[Tensor, " numbers"]:
        """Latents as they are stored: slot by slot, or dimension by dimension where there are parts."""
        return latents.flatten() if self.parts == 1 else latents.T.flatten()

    def unflattened(self, numbers: Num[Tensor, " numbers"], slots: int, dims: int) -> Num[Tensor, "S some"]:
        """Latents of so many slots and dimensions out of what is stored; a view."""
        return numbers.view(slots, dims) if self.parts == 1 else numbers.view(dims, slots).T

    def joined(self, pieces: Sequence[Tensor]) -> Num[Tensor, "S some"]:
        """Slots of several blocks after each other, laid as they will be stored."""
        return torch.cat(list(pieces)) if self.parts == 1 else torch.cat([piece.T for piece in pieces], dim=1).T


def by_head(back: Float[Tensor, "P r x"], heads: int) -> Float[Tensor, "H r D"]:
    """Ways back to all heads of a part, as ways back to each head."""
    return back.unflatten(2, (heads // len(back), -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _in_turn(parts: Float[Tensor, "P S r"]) -> Float[Tensor, "S R"]:
    """Latents whose parts take turns."""
    return parts.permute(1, 2, 0).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentBlock:
    """Slots of one row that are kept in equally many dimensions; attended quickest as `Basis.unflattened` has them."""

    keys: Num[Tensor, "S rk"]
    values: Num[Tensor, "S rv"]
    positions: Int[Tensor, " S"]
    scales: Float[Tensor, "S 2"] | None = None  # where keys and values are codes: of either

    def key_numbers(self) -> Float[Tensor, "S rk"]:
        """Latents of keys as numbers."""
        return self.keys if self.scales is None else self.keys.float() * self.scales[:, :1].float()

    def value_numbers(self) -> Float[Tensor, "S rv"]:
        """Latents of values as numbers."""
        return self.values if self.scales is None else self.values.float() * self.scales[:, 1:].float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """How the keys and values of one layer are written. `rotary` where the keys' basis is one before rotation."""

    keys: Basis
    values: Basis
    rotary: Rotary | None = None

    @property
    def heads(self) -> int:
        """Key/value heads of the layer."""
        return len(self.values.decode)

    def write(self, keys: Float[Tensor, "S H D"], values: Float[Tensor, "S H E"],
              positions: Int[Tensor, " S"]) -> tuple[Float[Tensor, "S K"], Float[Tensor, "S V"]]:  # fmt: skip
        """Latents of some slots, in float32 or wider."""
        if self.rotary is not None:
            cosines, sines = self.rotary.at(positions)
            wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
            keys = unrotate(wide, cosines[:, None], sines[:, None])
        return self.keys.write(keys.flatten(1)), self.values.write(values.flatten(1))

    def read_keys(self, block: LatentBlock) -> Float[Tensor, "S H D"]:
        """Keys as they are scored, in float32 or wider."""
        keys = self.keys.read(block.key_numbers()).unflatten(-1, (self.heads, -1))
        if self.rotary is None:
            return keys
        cosines, sines = self.rotary.at(block.positions)
        return rotate(keys, cosines[:, None], sines[:, None])

    def read_values(self, block: LatentBlock) -> Float[Tensor, "S H E"]:
        """Values, in float32 or wider."""
        return self.values.read(block.value_numbers()).unflatten(-1, (self.heads, -1))


class Laid(NamedTuple):
    """A block as products read it, made once: views, for every one of them costs as much as a small product."""

    keys: Num[Tensor, "*P rk S"]  # of each part; P is left out where there is one
    values: Num[Tensor, "*P S rv"]
    slots: int
    block: LatentBlock

    @classmethod
    def of(cls, block: LatentBlock, bases: Bases) -> "Laid":
        """The views of a block that these bases wrote."""
        keys, values = _apart(block.keys, bases.keys.parts), _apart(block.values, bases.values.parts).mT
        return cls(
            keys[0] if bases.keys.parts == 1 else keys,
            values[0] if bases.values.parts == 1 else values,
            len(block.positions),
            block,
        )


def attend_latents(queries: Float[Tensor, "G Q D"], blocks: Sequence[Laid], bases: Bases, *, scale: float) -> Partial:
    """Attention of one row's queries over all slots of its blocks, as a Partial of one row. There is a slot."""
    group = queries.shape[0] // bases.heads
    wide = torch.promote_types(queries.dtype, torch.float32)
    asked = (queries.to(wide) * scale).unflatten(0, (bases.heads, group)).flatten(1, 2)  # H, group x Q, D
    slots = sum(block.slots for block in blocks)
    step = max(_SCORES // (bases.heads * slots), 1)
    pieces = [_attend(asked[:, first : first + step], blocks, bases) for first in range(0, asked.shape[1], step)]
    output = torch.cat([piece[0] for piece in pieces], dim=1) if len(pieces) > 1 else pieces[0][0]
    weights = torch.cat([piece[1] for piece in pieces], dim=1) if len(pieces) > 1 else pieces[0][1]
    shape = queries.shape[:2]
    return Partial(output.reshape(1, *shape, -1).to(queries.dtype), weights.reshape(1, *shape))


def _attend(asked: Tensor, blocks: Sequence[Laid], bases: Bases) -> tuple[Tensor, Tensor]:
    """Output [H, rows, E] and log-sum-exp [H, rows] of scaled queries [H, rows, D]."""
    if bases.rotary is None:
        scores, shift = _absorbed_scores(asked, blocks, bases.keys)
    else:
        scores, shift = _written_scores(asked, [one.block for one in blocks], bases), None
    highest = scores.amax(dim=1, keepdim=True)
    weights = scores.sub_(highest).exp_()  # rows of all heads, slots
    total = weights.sum(dim=1, keepdim=True)
    heads, rows = asked.shape[:2]
    latent = _weighted(weights, blocks, bases.values) / total.view(bases.values.parts, -1, 1)
    mean = bases.values.mean.to(latent.dtype).view(heads, 1, -1)
    each = latent.unflatten(1, (heads // len(latent), -1)).flatten(0, 1)
    output = torch.baddbmm(mean, each, bases.values.decode.to(latent.dtype))
    log_sum_exp = (total.log() + highest).view(heads, rows)
    return output, log_sum_exp if shift is None else log_sum_exp + shift


def _absorbed_scores(asked: Tensor, blocks: Sequence[Laid], basis: Basis) -> tuple[Tensor, Tensor]:
    """Scores without the mean's, which is the same for all slots and comes back beside them."""
    heads, parts = asked.shape[0], basis.parts
    inside = torch.bmm(asked, basis.decode.to(asked.dtype).mT)  # H, rows, r
    inside = inside.flatten(0, 1) if parts == 1 else inside.view(parts, -1, inside.shape[-1])
    shift = torch.bmm(asked, basis.mean.to(asked.dtype).view(heads, -1, 1))[..., 0]
    product, ready, step = (torch.mm, _at_hand, _TILE) if parts == 1 else (torch.bmm, Tensor.to, _WIDE_TILE)
    each = []
    for keys, _, slots, block in blocks:
        some = inside[..., : keys.shape[-2]]
        if asked.device.type == "cuda":
            each.append(_wide(some, keys if block.scales is None else keys.to(asked.dtype)))
        elif slots <= step:
            each.append(product(some, ready(keys, asked.dtype)))
        else:
            each += [product(some, ready(tile, asked.dtype)) for tile in keys.split(step, dim=-1)]
    scores = torch.cat(each, dim=-1)
    scores = scores if parts == 1 else scores.flatten(0, 1)
    scales = [one.block.scales[:, 0] for one in blocks if one.block.scales is not None]
    return scores.mul_(torch.cat(scales).to(scores.dtype)) if scales else scores, shift


def _wide(some: Tensor, keys: Tensor) -> Tensor:
    """A product in float32 on CUDA, of one part or several."""
    if keys.ndim == 3:
        return wide_product(some.to(keys.dtype), keys)
    return wide_product(some[None].to(keys.dtype), keys[None])[0]


def _written_scores(asked: Tensor, blocks: Sequence[LatentBlock], bases: Bases) -> Tensor:
    scores = []
    step = _TILE if asked.device.type == "cpu" else _CUDA_TILE
    for block in blocks:
        for first in range(0, len(block.positions), step):
            some = slice(first, first + step)
            scales = None if block.scales is None else block.scales[some]
            tile = LatentBlock(
                keys=block.keys[some], values=block.values[some], positions=block.positions[some], scales=scales
            )
            keys = bases.read_keys(tile).to(asked.dtype)
            scores.append(torch.bmm(asked, keys.permute(1, 2, 0)).flatten(0, 1))
    return torch.cat(scores, dim=1)


def _weighted(weights: Tensor, blocks: Sequence[Laid], basis: Basis) -> Float[Tensor, "P rows r"]:
    """Latents of values, added up by weight; in bfloat16 and float16 the products are taken as they are stored."""
    alone = basis.parts == 1
    weights = weights if alone else weights.unflatten(0, (basis.parts, -1))
    latent = weights.new_zeros(*weights.shape[:-1], basis.decode.shape[1])
    add = Tensor.addmm_ if alone else Tensor.baddbmm_
    own_weights = weights.split([one.slots for one in blocks], dim=-1)
    for own, (_, values, _, block) in zip(own_weights, blocks, strict=True):
        into = latent[..., : values.shape[-1]]
        if block.scales is not None:
            own = own * block.scales[:, 1].to(own.dtype)
            step = _TILE if own.device.type == "cpu" else _CUDA_TILE
            for some, tile in zip(own.split(step, dim=-1), values.split(step, dim=-2), strict=True):
                add(into, some, tile.to(own.dtype))
        elif values.dtype != weights.dtype:
            into.add_(torch.matmul(own.to(values.dtype), values))
        else:
            add(into, own, _at_hand(values, own.dtype) if alone else values)
    return latent[None] if alone else latent


def _apart(latents: Num[Tensor, "S R"], parts: int) -> Num[Tensor, "P r S"]:
    """Latents of each part; a view."""
    return latents.T.unflatten(0, (-1, parts)).transpose(0, 1)


def _at_hand(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """A tile in the dtype of the product, and in the processor's cache: the product itself reads it across its rows."""
    if tile.dtype != dtype:
        return tile.to(dtype)
    if tile.device.type == "cpu" and tile.numel() > _SMALL:
        tile.amax()  # a quarter off the product's time, where slots come from memory
    return tile
