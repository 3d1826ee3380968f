"""Votes: from what queries look at, token by token, to which stretches of a text matter.

A token that is looked at is worth little without the words around it. It knows tensors only; who votes, and what
becomes of the stretches (chunkkv keeps them, sentkv reads them), it does not.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

POOL = 7  # neighbours over which a vote is averaged
_FADING = 0.9999  # of a vote from one token to the next: it orders a stretch, and lets no other vote in between


def stretched(votes: Float[Tensor, "B V S"], *, pool: int, reach: int) -> Float[Tensor, "B S"]:
    """The best vote of any voter within reach of each token; where that is the same, the nearer token is worth more."""
    near = avg_pool1d(votes, pool, stride=1, padding=pool // 2, count_include_pad=False).amax(dim=1, keepdim=True)
    for _ in range(reach):
        near = torch.maximum(near, _FADING * max_pool1d(near, 3, stride=1, padding=1))
    return near[:, 0]
