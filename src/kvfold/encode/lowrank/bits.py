"""Bits: how many each latent dimension of a model gets, so that so many bytes cost the least loss (water-filling).

All dimensions of keys and of values of all layers compete. The cost of leaving a dimension out, and that of the noise
of b bits in it, are measured growths of the loss. Nothing here knows a plan.

After KVTC, KV Cache Transform Coding for Compact Storage in LLM Inference, https://arxiv.org/abs/2511.01815
Ours differs: bits follow the measured loss of the model's predictions, where the paper's follow the error of what is
read back.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.attention.bit_planes import ERRORS, bytes_of

WIDTHS = tuple(ERRORS)  # bits that a dimension may get, growing
_STEPS = 60  # of the bisection: far below the difference of any two prices that matter


def allocate_bits(
    alone: Float[Tensor, " dims"],
    noise: Float[Tensor, " dims"],
    sizes: Sequence[int],
    wanted_bytes: int,
) -> list[list[int]]:
    """Give bits to the dimensions of several sides, one side after the other, within so many bytes a token.

    `alone` is the loss of leaving a dimension out, `noise` the loss per relative noise of one.
    """
    errors = torch.tensor([ERRORS[width] for width in WIDTHS], dtype=torch.float64, device=noise.device)
    costs = noise.double()[:, None] * errors  # dims widths
    costs[:, 0] = torch.maximum(alone.double(), noise.double())  # left out, nothing is random: errors may add up
    price_of = torch.tensor(WIDTHS, dtype=torch.float64, device=noise.device)

    def at(price: float) -> list[list[int]]:
        chosen = (costs + price * price_of).argmin(dim=1)
        widths = [WIDTHS[choice] for choice in chosen.tolist()]
        starts = [sum(sizes[:side]) for side in range(len(sizes))]
        return [widths[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    # At a price above the largest cost no dimension gets a bit, so bytes fall from all to none between the two prices.
    high = float(costs.max()) + 1.0
    low = high * 2.0**-_STEPS
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5  # prices differ by orders of magnitude
        if sum(map(bytes_of, at(middle))) > wanted_bytes:
            low = middle
        else:
            high = middle
    return at(high)
