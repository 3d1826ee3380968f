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
        # Python's sort is stable: dimensions of equal bits stay in their order.
        order = sorted((dim for dim, width in enumerate(bits) if width), key=lambda dim: -bits[dim])
        widths = [bits[dim] for dim in order]
        device = sizes.device
        chosen = sizes[torch.tensor(order, dtype=torch.long, device=device)].float()
        chosen = chosen.clamp(min=torch.finfo(torch.float32).tiny)  # divided by below
        relative = torch.tensor([CELLS[width] for width in widths], device=device)
        return cls(
            bits=tuple(bits),
            order=torch.tensor(order, dtype=torch.long, device=device),
            cells=relative * chosen,
            half=torch.tensor([1 << (width - 1) for width in widths], dtype=torch.int16, device=device),
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

    def pack(self, vectors: Float[Tensor, "S R"]) -> tuple[UInt8[Tensor, "S bytes"], Float[Tensor, " S"]]:
        """Write vectors: their planes side by side, and the float16 scale of each."""
        coded = vectors[:, self.order].float()
        squares = (coded / self.sizes).square()
        scales = squares.mean(dim=1).sqrt() if len(self.order) else squares.new_zeros(len(vectors))
        scales = scales.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
        # Divided by the rounded scale, for that is the one that readers multiply by.
        signed = (coded / (scales.float()[:, None] * self.cells)).floor()
        codes = torch.minimum(signed.clamp(min=-self.half), self.half - 1) + self.half
        codes = codes.to(torch.int16)
        planes = [_packed(codes[:, :dims] >> place & 1) for place, dims in enumerate(self.planes)]
        empty = codes.new_zeros(len(vectors), 0, dtype=torch.uint8)
        return torch.cat([empty, *planes], dim=1), scales

    def unpack(
        self,
        codes: UInt8[Tensor, "S bytes"],
        scales: Float[Tensor, " S"],
    ) -> Float[Tensor, "S leading"]:
        """Read vectors back, in float32; dimensions without bits are zero."""
        table = _bits_of_bytes(codes.device)
        numbers = codes.new_zeros(len(codes), len(self.order), dtype=torch.float32)
        ends = [0]
        for place, dims in enumerate(self.planes):
            ends.append(ends[-1] + _bytes(dims))
            plane = codes[:, ends[-2] : ends[-1]]
            bits = table[plane.int()].flatten(1)  # S, eight dimensions a byte
            numbers[:, :dims].add_(bits[:, :dims], alpha=float(1 << place))
        # The middle of a cell lies half a width above its lower end.
        numbers.sub_(self.half - 0.5).mul_(self.cells).mul_(scales.float()[:, None])
        vectors = numbers.new_zeros(len(codes), len(self.bits))
        return vectors.index_copy_(1, self.order, numbers)


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
    padded = torch.nn.functional.pad(bits, (0, _bytes(dims) * 8 - dims))
    by_byte = padded.unflatten(1, (-1, 8))  # S bytes 8
    weights = 1 << torch.arange(8, dtype=bits.dtype, device=bits.device)
    return (by_byte * weights).sum(dim=2).to(torch.uint8)


@cache
def _bits_of_bytes(device: torch.device) -> Float[Tensor, "256 8"]:
    """List the bits of every byte, lowest first."""
    with torch.inference_mode(False):  # made once: it must serve forwards outside inference mode too
        every = torch.arange(256, device=device)[:, None]
        return (every >> torch.arange(8, device=device) & 1).float()
