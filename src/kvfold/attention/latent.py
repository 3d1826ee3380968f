"""Attention over latents: keys and values of all heads of a layer in few dimensions, and never written out again.

A basis turns the numbers of all heads of a slot into a latent and back. Where the latent is one of the key as it is
scored, the map back is taken into the query, once a step; where it is one of the key before its rotation, keys are
written out tile by tile. Values are added up as latents and mapped back once a query head. Exact up to rounding:
what comes out is attention over the slots as the basis reads them back. One row at a time; it knows tensors only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.attention.partial import Partial
from kvfold.attention.rotary import Rotary, rotate, unrotate

_TILE = 2048  # slots that are widened, or written out, at a time
_SCORES = 1 << 22  # scores that are held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """A linear way into a latent and back, weightiest dimensions first: z = (x - mean) encode, x = z decode + mean."""

    encode: Float[Tensor, "X R"]  # X: the numbers of all heads of a slot, head by head
    decode: Float[Tensor, "R X"]
    mean: Float[Tensor, " X"]

    def write(self, numbers: Float[Tensor, "*slots X"]) -> Float[Tensor, "*slots R"]:
        """Latents, in float32 or wider."""
        wide = torch.promote_types(numbers.dtype, torch.float32)
        return (numbers.to(wide) - self.mean.to(wide)) @ self.encode.to(wide)

    def read(self, latents: Float[Tensor, "*slots r"]) -> Float[Tensor, "*slots X"]:
        """The numbers that the first r dimensions stand for, in float32 or wider."""
        wide = torch.promote_types(latents.dtype, torch.float32)
        return latents.to(wide) @ self.decode[: latents.shape[-1]].to(wide) + self.mean.to(wide)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentBlock:
    """Slots of one row that are kept in equally many dimensions."""

    keys: Float[Tensor, "S rk"]
    values: Float[Tensor, "S rv"]
    positions: Int[Tensor, " S"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """How the keys and values of one layer are written. `rotary` where the keys' basis is one before rotation."""

    keys: Basis
    values: Basis
    heads: int
    rotary: Rotary | None = None

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
        keys = self.keys.read(block.keys).unflatten(-1, (self.heads, -1))
        if self.rotary is None:
            return keys
        cosines, sines = self.rotary.at(block.positions)
        return rotate(keys, cosines[:, None], sines[:, None])

    def read_values(self, block: LatentBlock) -> Float[Tensor, "S H E"]:
        """Values, in float32 or wider."""
        return self.values.read(block.values).unflatten(-1, (self.heads, -1))


def attend_latents(
    queries: Float[Tensor, "G Q D"], blocks: Sequence[LatentBlock], bases: Bases, *, scale: float
) -> Partial:
    """Attention of one row's queries over all slots of its blocks, as a Partial of one row. There is a slot."""
    group = queries.shape[0] // bases.heads
    wide = torch.promote_types(queries.dtype, torch.float32)
    asked = (queries.to(wide) * scale).unflatten(0, (bases.heads, group)).flatten(1, 2)  # H, group x Q, D
    slots = sum(len(block.positions) for block in blocks)
    step = max(_SCORES // (bases.heads * slots), 1)
    pieces = [_attend(asked[:, first : first + step], blocks, bases) for first in range(0, asked.shape[1], step)]
    output = torch.cat([piece[0] for piece in pieces], dim=1) if len(pieces) > 1 else pieces[0][0]
    weights = torch.cat([piece[1] for piece in pieces], dim=1) if len(pieces) > 1 else pieces[0][1]
    shape = queries.shape[:2]
    return Partial(output.reshape(1, *shape, -1).to(queries.dtype), weights.reshape(1, *shape))


def _attend(asked: Tensor, blocks: Sequence[LatentBlock], bases: Bases) -> tuple[Tensor, Tensor]:
    """Output [H, rows, E] and log-sum-exp [H, rows] of scaled queries [H, rows, D]."""
    if bases.rotary is None:
        scores, shift = _absorbed_scores(asked, blocks, bases.keys)
    else:
        scores, shift = _written_scores(asked, blocks, bases), None
    highest = scores.amax(dim=1, keepdim=True)
    weights = scores.sub_(highest).exp_()  # rows of all heads, slots
    total = weights.sum(dim=1, keepdim=True)
    latent = _weighted(weights, blocks, bases.values.decode.shape[0]) / total
    heads, rows = asked.shape[:2]
    back = bases.values.decode.to(latent.dtype).unflatten(1, (heads, -1)).transpose(0, 1)  # H R E
    mean = bases.values.mean.to(latent.dtype).view(heads, 1, -1)
    output = torch.baddbmm(mean, latent.view(heads, rows, -1), back)
    log_sum_exp = (total.log() + highest).view(heads, rows)
    return output, log_sum_exp if shift is None else log_sum_exp + shift


def _absorbed_scores(asked: Tensor, blocks: Sequence[LatentBlock], basis: Basis) -> tuple[Tensor, Tensor]:
    """Scores without the mean's, which is the same for all slots and comes back beside them."""
    heads, rows = asked.shape[:2]
    back = basis.decode.to(asked.dtype).unflatten(1, (heads, -1)).permute(1, 2, 0)  # H D R
    inside = torch.bmm(asked, back).flatten(0, 1)  # H x rows, R
    shift = torch.bmm(asked, basis.mean.to(asked.dtype).view(heads, -1, 1))[..., 0]
    tiles = (tile for block in blocks for tile in block.keys.split(_TILE))
    scores = [inside[:, : tile.shape[1]] @ _at_hand(tile, asked.dtype).T for tile in tiles]
    assert rows * heads == inside.shape[0]
    return torch.cat(scores, dim=1), shift


def _written_scores(asked: Tensor, blocks: Sequence[LatentBlock], bases: Bases) -> Tensor:
    scores = []
    for block in blocks:
        for first in range(0, len(block.positions), _TILE):
            some = slice(first, first + _TILE)
            tile = LatentBlock(keys=block.keys[some], values=block.values[some], positions=block.positions[some])
            keys = bases.read_keys(tile).to(asked.dtype)
            scores.append(torch.bmm(asked, keys.permute(1, 2, 0)).flatten(0, 1))
    return torch.cat(scores, dim=1)


def _weighted(weights: Tensor, blocks: Sequence[LatentBlock], size: int) -> Tensor:
    """Latents of values, added up by weight; in bfloat16 and float16 the products are taken as they are stored."""
    latent = weights.new_zeros(weights.shape[0], size)
    begun = 0
    for block in blocks:
        own = weights[:, begun : begun + len(block.positions)]
        begun += len(block.positions)
        into = latent[:, : block.values.shape[1]]
        if block.values.dtype == weights.dtype:
            into.addmm_(own, _at_hand(block.values, weights.dtype))
        else:
            into.add_(own.to(block.values.dtype) @ block.values)
    return latent


def _at_hand(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """A tile in the dtype of the product, and in the processor's cache: the product itself reads it across its rows."""
    if tile.dtype != dtype:
        return tile.to(dtype)
    if tile.device.type == "cpu" and tile.numel():
        tile.amax()  # a quarter off the product's time, where slots come from memory
    return tile
