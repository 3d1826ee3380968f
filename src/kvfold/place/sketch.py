"""Sketches: the keys of offloaded slots in half of their dimensions, 4 bits each. A page scores as its best slot.

The dimensions are the principal ones of a head's first keys (Loki, https://arxiv.org/abs/2406.02542, ranks tokens by
them), measured anew while these are few. Ours differs: numbers have 4 bits, so that a sketch takes a sixteenth of a
slot in 16 bits, and whole sentences are read. A reference [1 + R, D] says how a head's keys are written: their mean,
then a row for each dimension, as long as its cells are wide.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kvfold.attention.kernels.compiled import sketch_products

CELL = 0.45  # width of a cell in standard deviations: 16 cells reach 3.6 of them to either side
_HALF = 8  # of the cells
_LEAST = 2  # keys of which dimensions can be measured
ENOUGH = 1024  # keys of which they are measured once and for all


def dimensions(size: int) -> int:
    """Count the dimensions of a sketch of keys of this size: half of them, an even number.

    >>> dimensions(64)
    32
    """
    return 2 * -(-size // 4)


def fit(keys: Float[Tensor, "S D"]) -> Float[Tensor, "rows D"]:
    """Measure how the keys of a head are written."""
    size = keys.shape[1]
    count = dimensions(size)
    if len(keys) < _LEAST:
        basis, widths = torch.eye(size, device=keys.device)[:, :count], torch.ones(count, device=keys.device)
        mean = torch.zeros(1, size, device=keys.device)
    else:
        wide = keys.float()
        mean = wide.mean(dim=0, keepdim=True)
        variances, vectors = torch.linalg.eigh((wide - mean).mT @ (wide - mean) / len(keys))
        basis = vectors[:, -count:]
        largest = variances[-1].clamp(min=1e-12)
        widths = CELL * variances[-count:].clamp(min=1e-6 * largest).sqrt()
    return torch.cat([mean, (basis * widths).mT])


def write(keys: Float[Tensor, "S D"], reference: Float[Tensor, "rows D"]) -> UInt8[Tensor, "S half"]:
    """Write keys, two numbers to a byte."""
    mean, rows = reference[:1], reference[1:]
    numbers = (keys.float() - mean) @ (rows / rows.square().sum(dim=1, keepdim=True)).mT  # in cells
    cells = (numbers.floor() + _HALF).clamp(0, 2 * _HALF - 1).to(torch.uint8)
    low, high = cells.chunk(2, dim=1)
    return low | high << 4


def products(
    queries: Float[Tensor, "N K D"],
    codes: UInt8[Tensor, "N S half"],
    references: Float[Tensor, "N rows D"],
) -> Float[Tensor, "N K S"]:
    """Multiply queries by keys as they were written, up to a constant for each query."""
    asked = queries.float() @ references[:, 1:].mT  # N K R
    read = sketch_products(asked, codes, queries.shape[2])
    if read is not None:
        return read
    low, high = asked.to(queries.dtype).chunk(2, dim=2)
    cells = (codes & 15).to(queries.dtype), (codes >> 4).to(queries.dtype)
    return torch.baddbmm(low @ cells[0].mT, high, cells[1].mT).float()
