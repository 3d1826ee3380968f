"""Numbers as signed bytes: codes of -127 to 127, and one float16 scale for each vector. It knows nothing of slots.

Symmetric and rounded to nearest: a vector of zeros stays zero, and no number moves by more than half a scale, as long
as the scale is a normal number of float16 (6e-5 to 65504: vectors whose largest number is 0.008 to 8 million).
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

_LEVELS = 127
_SMALLEST_SCALE, _LARGEST_SCALE = 6e-8, 65504.0  # float16's smallest and largest number


def to_codes(numbers: Float[Tensor, "*vectors D"]) -> tuple[Int8[Tensor, "*vectors D"], Float[Tensor, "*vectors"]]:
    """Codes, and the scale of each vector in float16."""
    if not numbers.shape[-1]:
        return numbers.to(torch.int8), numbers.new_full(numbers.shape[:-1], _SMALLEST_SCALE, dtype=torch.float16)
    scales = (numbers.abs().amax(dim=-1) / _LEVELS).clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)
    codes = (numbers / scales.to(numbers.dtype)[..., None]).round().clamp(-_LEVELS, _LEVELS)
    return codes.to(torch.int8), scales
