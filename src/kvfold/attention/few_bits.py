"""Numbers in 2 or 4 bits: codes between the smallest and the largest of a group, and two float16 numbers for each.

Asymmetric and rounded to nearest: a group of equal numbers stays as it is, and no number moves by more than half a
step, as long as the smallest number of its group fits float16. It knows nothing of slots.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_SMALLEST_STEP = 6e-8  # float16's smallest number: a constant group stays constant


def to_few_bits(
    grouped: Float[Tensor, "*vectors groups size"],
    bits: int,
) -> tuple[UInt8[Tensor, "*vectors bytes"], Float[Tensor, "*vectors groups"], Float[Tensor, "*vectors groups"]]:
    """Quantise groups; gives packed codes, steps and lows. The first of the numbers in a byte is its lowest."""
    largest = (1 << bits) - 1
    low = grouped.amin(dim=-1)
    high = grouped.amax(dim=-1)
    lows = low.to(torch.float16)
    # Measured and divided by rounded numbers, for those are the ones that readers use.
    start = lows.float()
    steps = (high - start) / largest
    steps = steps.clamp(min=_SMALLEST_STEP)
    steps = steps.to(torch.float16)
    divisors = steps.float()
    codes = grouped - start[..., None]
    codes /= divisors[..., None]
    codes = codes.round().clamp(0, largest)
    flat = codes.to(torch.uint8).flatten(-2)
    share = 8 // bits  # codes of a byte
    packed = flat[..., 0::share].clone()
    for place in range(1, share):
        shifted = flat[..., place::share] << (place * bits)
        packed |= shifted
    return packed, steps, lows


def from_few_bits(
    packed: UInt8[Tensor, "*vectors bytes"],
    steps: Float[Tensor, "*vectors groups"],
    lows: Float[Tensor, "*vectors groups"],
    bits: int,
) -> Float[Tensor, "*vectors D"]:
    """Read numbers back, in float32: low plus code times step."""
    largest = (1 << bits) - 1
    places = range(0, 8, bits)
    shifted = [packed >> place for place in places]
    codes = torch.stack(shifted, dim=-1)
    codes &= largest
    flat = codes.flatten(-2)
    groups = lows.shape[-1]
    numbers = flat.unflatten(-1, (groups, -1)).float()
    numbers *= steps.float()[..., None]
    numbers += lows.float()[..., None]
    return numbers.flatten(-2)
