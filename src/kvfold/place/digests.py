"""Digests: the keys of a page in one or two vectors. sentkv chooses among these forms.

Each takes keys page after page and the lengths, and works in float32; a score is q . centre + |q| . spread.
Extremes bound every q . k of the page from above; means rank pages with one outstanding key low.
Extremes are Quest's, https://arxiv.org/abs/2406.10774; means SentenceKV's, https://arxiv.org/abs/2504.00970
Ours differs: extremes are kept as their middle and half their distance, so every form is scored alike.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.place.page_index import Digest

DigestForm = Callable[[Tensor, Tensor], Digest]

_DEVIATIONS = 1.0  # how many standard deviations beyond the mean a spread reaches


def minmax(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Take the middle of the smallest and largest value in each dimension, and half of their distance."""
    low, high = (
        _reduced(
            keys.float(),
            lengths,
            "min",
        ),
        _reduced(
            keys.float(),
            lengths,
            "max",
        ),
    )
    return Digest(centres=((high + low) / 2)[:, None], spreads=((high - low) / 2)[:, None])


def mean(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Average the keys."""
    return Digest(centres=_reduced(keys.float(), lengths, "mean")[:, None])


def spread(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Average the keys, and take the standard deviation of each dimension."""
    wide = keys.float()
    middle, squares = (
        _reduced(
            wide,
            lengths,
            "mean",
        ),
        _reduced(
            wide.square(),
            lengths,
            "mean",
        ),
    )
    # E[k^2] - E[k]^2 may be rounded to below 0.
    deviations = (squares - middle.square()).clamp(min=0).sqrt() * _DEVIATIONS
    return Digest(centres=middle[:, None], spreads=deviations[:, None])


def halves(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Average the keys of the first and of the second half: two centroids."""
    first = (lengths + 1) // 2  # the longer half, where lengths are odd
    both = torch.stack([first, lengths - first], dim=1).flatten()  # 2 M: halves of a page lie side by side
    means = _reduced(keys.float(), both, "mean").unflatten(0, (-1, 2))  # M 2 D
    single = (lengths < 2)[:, None]  # no second half: its mean is of nothing
    return Digest(
        centres=torch.stack(
            [
                means[:, 0],
                torch.where(
                    single,
                    means[:, 0],
                    means[:, 1],
                ),
            ],
            dim=1,
        )
    )


DIGESTS: Mapping[str, DigestForm] = MappingProxyType(
    {"minmax": minmax, "mean": mean, "spread": spread, "halves": halves}
)


def _reduced(keys: Tensor, lengths: Tensor, how: str) -> Tensor:
    """Reduce keys [S, D] page by page to [M, D]: their `min`, `max` or `mean`."""
    # `unsafe` leaves out a check that the lengths sum to S, for which a GPU would have to be waited for.
    return torch.segment_reduce(keys, how, lengths=lengths, axis=0, unsafe=True)
