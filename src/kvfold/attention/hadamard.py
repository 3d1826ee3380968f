"""A rotation that spreads large numbers over their vector: the Walsh-Hadamard matrix, scaled to be orthogonal.

Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, https://arxiv.org/abs/2404.00456
Few dimensions of keys are much larger than the others and make the steps of their group coarse; after the rotation all
are alike. Scores of rotated queries and rotated keys are those of the plain ones, and an output of rotated values is
turned back by the same matrix, which is its own inverse. It knows no slots.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor


def rotated(numbers: Float[Tensor, "*vectors D"]) -> Float[Tensor, "*vectors D"]:
    """Rotate each vector; twice gives the vector back.

    A size that is no power of two is rotated in blocks of the largest power of two that divides it.
    """
    size = numbers.shape[-1]
    block = size & -size
    if block < 2:
        return numbers
    wide = numbers if numbers.dtype == torch.float64 else numbers.float()  # the sums are longer than bfloat16 is exact
    blocks = wide.unflatten(-1, (size // block, block)) @ _matrix(block, wide.dtype, wide.device)
    return blocks.flatten(-2).to(numbers.dtype)


@cache
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size size"]:
    """Make the matrix of a size that is a power of two: each doubling puts four of the smaller one side by side."""
    with torch.inference_mode(False):  # it is kept, and later forwards may have gradients
        step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype) / 2**0.5
        matrix = torch.ones(1, 1, dtype=dtype)
        while len(matrix) < size:
            matrix = torch.kron(matrix, step)
        return matrix.to(device)
