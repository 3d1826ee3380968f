"""Bases: linear maps from the keys and values of a slot into a latent of few dimensions, and back.

A basis maps the numbers of all heads of a slot together, or part by part (a part is heads that share a map). The keys'
basis may be one before rotation; then keys are turned back on the way in and turned again on the way out. A block is
slots of one row that are kept in equally many dimensions. It knows tensors only, not which slots get which dimensions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from kvfold.attention.bit_planes import BitPlanes
from kvfold.attention.rotary import Rotary, rotate, unrotate


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """A linear map into a latent and back, weightiest dimensions first: z = (x - mean) encode, x = z decode + mean.

    `part_size` is the number of numbers of a slot in one part, head by head; P times it is X. Dimensions of the parts
    take turns in a latent (first of each, second of each), so a prefix of a multiple of P dimensions keeps equally
    many of every part.
    """

    encode: Float[Tensor, "P part_size part_rank"]
    decode: Float[Tensor, "H part_rank D"]  # to each head, out of the latent of its part
    mean: Float[Tensor, " X"]

    @property
    def parts(self) -> int:
        """Groups of heads that share a map."""
        return self.encode.shape[0]

    def write(self, numbers: Float[Tensor, "S X"]) -> Float[Tensor, "S R"]:
        """Map numbers to latents, in float32 or wider."""
        wide = torch.promote_types(numbers.dtype, torch.float32)
        centred = numbers.to(wide) - self.mean.to(wide)
        encode = self.encode.to(wide)
        parts, part_size, _ = encode.shape
        by_slot = centred.reshape(len(centred), parts, part_size)
        by_part = by_slot.transpose(0, 1)  # P S part_size
        return _interleave(by_part @ encode)

    def slopes(self, slopes: Float[Tensor, "S X"]) -> Float[Tensor, "S R"]:
        """Map gradients by the numbers to gradients by the latents."""
        decode = self.decode.to(slopes.dtype)
        by_slot = slopes.reshape(len(slopes), len(decode), -1)  # S H D
        by_head = by_slot.transpose(0, 1)  # H S D
        of_heads = by_head @ decode.mT  # H S part_rank
        of_parts = of_heads.unflatten(0, (self.parts, -1))  # P, heads of a part, S, part_rank
        return _interleave(of_parts.sum(dim=1))

    def read(self, latents: Float[Tensor, "S leading"]) -> Float[Tensor, "S X"]:
        """Map the leading dimensions of latents back to numbers, in float32 or wider."""
        wide = torch.promote_types(latents.dtype, torch.float32)
        slots, leading = latents.shape
        rank = leading // self.parts
        # Parts take turns in a latent, so its dimensions are [rank, P].
        by_slot = latents.to(wide).reshape(slots, rank, self.parts)
        by_part = by_slot.permute(2, 0, 1)  # P S rank
        decode = self.decode[:, :rank].to(wide)  # H rank D
        to_heads = decode.unflatten(0, (self.parts, -1))  # P, heads of a part, rank, D
        to_part = to_heads.transpose(1, 2).flatten(2)  # P rank part_size
        numbers = by_part @ to_part  # P S part_size
        numbers = numbers.transpose(0, 1).flatten(1)  # S X
        return numbers + self.mean.to(wide)

    def flattened(self, latents: Num[Tensor, "S leading"]) -> Num[Tensor, " numbers"]:
        """Latents as they are stored: slot by slot, or dimension by dimension where there are parts."""
        if self.parts == 1:
            return latents.flatten()
        return latents.T.flatten()

    def unflattened(
        self,
        numbers: Num[Tensor, " numbers"],
        slots: int,
        dims: int,
    ) -> Num[Tensor, "S leading"]:
        """Latents of so many slots and dimensions out of what is stored; a view."""
        if self.parts == 1:
            return numbers.view(slots, dims)
        return numbers.view(dims, slots).T


def by_head(
    decode: Float[Tensor, "P part_rank part_size"],
    heads: int,
) -> Float[Tensor, "H part_rank D"]:
    """Split maps back to all heads of a part into maps back to each head."""
    heads_of_part = heads // len(decode)
    split = decode.unflatten(2, (heads_of_part, -1))  # P, part_rank, heads of a part, D
    by_head = split.transpose(1, 2)
    return by_head.flatten(0, 1).contiguous()


def _interleave(latents: Float[Tensor, "P S part_rank"]) -> Float[Tensor, "S R"]:
    """Latents whose parts take turns: dimension i of every part, then dimension i + 1 of every part."""
    turns = latents.permute(1, 2, 0)  # S part_rank P
    return turns.flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentBlock:
    """Slots of one row that are kept in equally many dimensions; attended quickest as `Basis.unflattened` has them."""

    keys: Num[Tensor, "S key_rank"]
    values: Num[Tensor, "S value_rank"]
    positions: Int[Tensor, " S"]
    scales: Float[Tensor, "S 2"] | None = None  # of keys and of values, where these are int8 or bit planes
    planes: tuple[BitPlanes, BitPlanes] | None = None  # how bytes of keys and of values are read, where they are planes

    def key_numbers(self) -> Float[Tensor, "S key_rank"]:
        """Latents of keys as floating-point numbers."""
        if self.scales is None:
            return self.keys
        if self.planes is not None:
            return self.planes[0].unpack(self.keys, self.scales[:, 0])
        key_scales = self.scales[:, :1].float()
        return self.keys.float() * key_scales

    def value_numbers(self) -> Float[Tensor, "S value_rank"]:
        """Latents of values as floating-point numbers."""
        if self.scales is None:
            return self.values
        if self.planes is not None:
            return self.planes[1].unpack(self.values, self.scales[:, 1])
        value_scales = self.scales[:, 1:].float()
        return self.values.float() * value_scales

    def write(
        self,
        first: int,
        block: "LatentBlock",
    ) -> None:
        """Write the slots of another block over those from `first` on."""
        count = len(block.positions)
        some = slice(first, first + count)
        self.keys[some] = block.keys
        self.values[some] = block.values
        self.positions[some] = block.positions
        if self.scales is not None and block.scales is not None:
            self.scales[some] = block.scales

    def tile(self, first: int, last: int) -> "LatentBlock":
        """The slots from `first` up to `last`; views."""
        some = slice(first, last)
        return LatentBlock(
            keys=self.keys[some],
            values=self.values[some],
            positions=self.positions[some],
            scales=None if self.scales is None else self.scales[some],
            planes=self.planes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """The bases of one layer's keys and values. `rotary` where the keys' basis is one before rotation."""

    keys: Basis
    values: Basis
    rotary: Rotary | None = None

    @property
    def heads(self) -> int:
        """Key/value heads of the layer."""
        return len(self.values.decode)

    def write(
        self,
        keys: Float[Tensor, "S H D"],
        values: Float[Tensor, "S H E"],
        positions: Int[Tensor, " S"],
    ) -> tuple[Float[Tensor, "S key_rank"], Float[Tensor, "S value_rank"]]:
        """Map keys and values of slots to latents, in float32 or wider."""
        if self.rotary is not None:
            wide = torch.promote_types(keys.dtype, torch.float32)
            cosines, sines = self.rotary.at(positions)
            keys = keys.to(wide)
            keys = unrotate(keys, cosines[:, None], sines[:, None])  # the same for every head
        key_latents = self.keys.write(keys.flatten(1))
        value_latents = self.values.write(values.flatten(1))
        return key_latents, value_latents

    def read_keys(self, block: LatentBlock) -> Float[Tensor, "S H D"]:
        """Map latents back to keys as queries meet them (after rotation), in float32 or wider."""
        numbers = self.keys.read(block.key_numbers())  # S X
        keys = numbers.unflatten(-1, (self.heads, -1))
        if self.rotary is None:
            return keys
        cosines, sines = self.rotary.at(block.positions)
        return rotate(keys, cosines[:, None], sines[:, None])

    def read_values(self, block: LatentBlock) -> Float[Tensor, "S H E"]:
        """Map latents back to values, in float32 or wider."""
        numbers = self.values.read(block.value_numbers())  # S X
        return numbers.unflatten(-1, (self.heads, -1))
