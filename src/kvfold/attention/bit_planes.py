"""Bit planes: vectors whose dimensions have few bits each, and not all equally many.

A number is divided by the usual size of its dimension and by the scale of its vector, and is put into one of 2^b equal
cells around zero; it is read back as the middle of its cell. Plane p holds bit p of every dimension that has more than
p bits, eight dimensions to a byte. Dimensions with more bits stand first, so each plane is a prefix of the one below
it. It knows nothing of slots, and not who says how many bits a dimension gets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

# Width of a cell in units of the scale, by bits. Latents have longer tails than normal numbers, so cells are wider.
CELLS = {2: 1.0, 3: 0.62, 4: 0.36, 5: 0.22, 6: 0.12, 8: 0.04}
# The mean square error over the mean square, measured on latents of SmolLM2; that of normal numbers is a little less.
ERRORS = {0: 1.0, 2: 0.132, 3: 0.0446, 4: 0.0152, 5: 0.0051, 6: 0.0017, 8: 0.00014}

_SMALLEST_SCALE = 6e-8  # the smallest number of float16
_LARGEST_SCALE = 65504.0  # and the largest


@dataclass(frozen=True, slots=True, eq=False)
class BitPlanes:
    """How the leading dimensions of latents are written."""

    bits: tuple[int, ...]  # of each leading dimension
    order: Int[Tensor, " coded"]  # dimensions with bits, most bits first
    cells: Float[Tensor, " coded"]  # width of a cell of each, in units of the vector's scale
    half: Int[Tensor, " coded"]  # half the number of cells of each: what turns signed numbers into codes
    sizes: Float[Tensor, " coded"]  # usual sizes
    planes: tuple[int, ...]  # dimensions in each plane, lowest bit first; falling

    @classmethod
    def of(cls, bits: Sequence[int], sizes: Float[Tensor, " R"]) -> "BitPlanes":
        """Give each leading dimension these bits; `sizes` are the root mean squares of all dimensions."""
        coded = [dim for dim, width in enumerate(bits) if width]
        # Python's sort is stable: dimensions of equal bits stay in their order.
        coded.sort(key=lambda dim: -bits[dim])
        widths = [bits[dim] for dim in coded]
        relative = [CELLS[width] for width in widths]
        halves = [1 << (width - 1) for width in widths]
        order = torch.tensor(coded, dtype=torch.long, device=sizes.device)
        chosen = sizes[order].float()
        # Sizes are divided by.
        chosen = chosen.clamp(min=torch.finfo(torch.float32).tiny)
        return cls(
            bits=tuple(bits),
            order=order,
            cells=chosen * torch.tensor(relative, device=sizes.device),
            half=torch.tensor(halves, dtype=torch.int16, device=sizes.device),
            sizes=chosen,
            planes=planes_of(widths),
        )

    @property
    def size_bytes(self) -> int:
        """Count the bytes of a vector, without its scale."""
        return sum(map(_bytes, self.planes))

    @property
    def weight_bytes(self) -> int:
        """Count the bytes of the tensors here, which belong to a model and not to a cache."""
        return sum(tensor.nbytes for tensor in (self.order, self.cells, self.half, self.sizes))

    def pack(
        self,
        vectors: Float[Tensor, "S R"],
    ) -> tuple[UInt8[Tensor, "S bytes"], Float[Tensor, " S"]]:
        """Write vectors: their planes side by side, and the float16 scale of each."""
        coded = vectors[:, self.order].float()
        scales = self._scales(coded)
        # Divided by the rounded scale, for that is the one that readers multiply by.
        widths = scales.float()[:, None] * self.cells
        places = (coded / widths).floor()
        lowest = -self.half
        highest = self.half - 1
        places = torch.minimum(places.clamp(min=lowest), highest)
        codes = (places + self.half).to(torch.int16)
        planes = [codes.new_zeros(len(vectors), 0, dtype=torch.uint8)]
        for place, dims in enumerate(self.planes):
            bits = codes[:, :dims] >> place
            planes.append(_packed(bits & 1))
        return torch.cat(planes, dim=1), scales

    def unpack(
        self,
        codes: UInt8[Tensor, "S bytes"],
        scales: Float[Tensor, " S"],
    ) -> Float[Tensor, "S leading"]:
        """Read vectors back, in float32; dimensions without bits are zero."""
        table = _bits_of_bytes(codes.device)
        numbers = codes.new_zeros(
            len(codes),
            len(self.order),
            dtype=torch.float32,
        )
        end = 0
        for place, dims in enumerate(self.planes):
            start = end
            end = start + _bytes(dims)
            plane = codes[:, start:end]
            bits = table[plane.int()]  # S bytes 8
            bits = bits.flatten(1)
            numbers[:, :dims].add_(bits[:, :dims], alpha=float(1 << place))
        # The middle of a cell lies half a width above its lower end.
        numbers.sub_(self.half - 0.5)
        numbers.mul_(self.cells)
        numbers.mul_(scales.float()[:, None])
        vectors = numbers.new_zeros(len(codes), len(self.bits))
        return vectors.index_copy_(1, self.order, numbers)

    def _scales(self, coded: Float[Tensor, "S coded"]) -> Float[Tensor, " S"]:
        """Take the root mean square of each vector's dimensions, each over its usual size."""
        if not len(self.order):  # a mean over nothing would be no number
            squares = coded.new_zeros(len(coded))
        else:
            squares = (coded / self.sizes).square()
            squares = squares.mean(dim=1)
        scales = squares.sqrt()
        scales = scales.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
        return scales.to(torch.float16)


def planes_of(widths: Sequence[int]) -> tuple[int, ...]:
    """Count the dimensions that have more bits than 0, 1, 2 and so on."""
    return tuple(sum(width > place for width in widths) for place in range(max(widths, default=0)))


def bytes_of(widths: Sequence[int]) -> int:
    """Count the bytes of a vector whose dimensions have these bits."""
    return sum(map(_bytes, planes_of(widths)))


def _bytes(dims: int) -> int:
    return -(-dims // 8)


def _packed(bits: Int[Tensor, "S dims"]) -> UInt8[Tensor, "S bytes"]:
    """Put eight dimensions into a byte, the first one lowest."""
    dims = bits.shape[1]
    missing = _bytes(dims) * 8 - dims
    padded = torch.nn.functional.pad(bits, (0, missing))
    by_byte = padded.unflatten(1, (-1, 8))  # S bytes 8
    places = torch.arange(8, dtype=bits.dtype, device=bits.device)
    weighed = by_byte * (1 << places)
    return weighed.sum(dim=2).to(torch.uint8)


@cache
def _bits_of_bytes(device: torch.device) -> Float[Tensor, "256 8"]:
    """List the bits of every byte, lowest first."""
    with torch.inference_mode(False):  # made once: it must serve forwards outside inference mode too
        every = torch.arange(256, device=device)
        places = torch.arange(8, device=device)
        shifted = every[:, None] >> places
        return (shifted & 1).float()
