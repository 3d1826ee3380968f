"""Many partial attentions into one, exactly: each part weighs as much as the exponentials of its scores add up to.

With o_i and l_i the output and log-sum-exp of part i, the whole is sum_i exp(l_i - l) o_i with l = logsumexp_i(l_i).
No approximation is made, so a layer may mix any layouts. Milakov and Gimelshein, Online normalizer calculation for
softmax, https://arxiv.org/abs/1805.02867
"""

from collections.abc import Sequence
from functools import reduce

import torch

from kvfold.attention.partial import Partial


def merge(parts: Sequence[Partial]) -> Partial:
    """Merge the attention over each part into the attention over all slots. A query that saw no slot gets zeros."""
    assert parts, "there is nothing to merge"
    if len(parts) == 1:
        return parts[0]
    weights = torch.stack([part.log_sum_exp for part in parts])  # parts B G Q
    total = reduce(torch.logaddexp, weights.unbind())  # several times quicker than logsumexp, and as exact
    # Where no part has a slot, the total is -inf as the parts are; the least finite number makes all shares 0, not NaN.
    lowest = torch.finfo(total.dtype).min
    finite = total.clamp(min=lowest)
    shares = (weights - finite).exp()
    shares = shares[..., None]  # parts B G Q 1
    first = parts[0].output
    output = shares[0] * first
    for share, part in zip(shares[1:], parts[1:], strict=True):
        output = torch.addcmul(output, share, part.output)
    return Partial(output.to(first.dtype), total)
