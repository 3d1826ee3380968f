"""Numbers as signed bytes: integers of -127 to 127, and one float16 scale for each vector. It knows nothing of slots.

Symmetric and rounded to nearest: a vector of zeros stays zero, and no number moves by more than half a scale, as long
as the scale is a normal number of float16 (6e-5 to 65504: vectors whose largest number is 0.008 to 8 million).
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

_LARGEST = 127  # of an int8, on both sides of zero: -128 is left out
_SMALLEST_SCALE = 6e-8  # the smallest number of float16
_LARGEST_SCALE = 65504.0  # and the largest


def to_int8(
    numbers: Float[Tensor, "*vectors D"],
) -> tuple[Int8[Tensor, "*vectors D"], Float[Tensor, "*vectors"]]:
    """Quantise each vector to int8; gives the integers and the float16 scale of each vector."""
    *vectors, size = numbers.shape
    if size == 0:  # no largest number to scale by
        scales = numbers.new_full(vectors, _SMALLEST_SCALE, dtype=torch.float16)
        return numbers.to(torch.int8), scales
    largest = numbers.abs().amax(dim=-1)
    scales = largest / _LARGEST
    scales = scales.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    scales = scales.to(torch.float16)
    # Divided by the rounded scale, for that is the one that readers multiply by.
    divisors = scales.to(numbers.dtype)
    integers = numbers / divisors[..., None]
    integers = integers.round()
    integers = integers.clamp(-_LARGEST, _LARGEST)
    return integers.to(torch.int8), scales
