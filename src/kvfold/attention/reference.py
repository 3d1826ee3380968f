"""Attention written to be read: slow, in float32 (float64 stays float64), with every matrix written out.

It is the oracle of every faster path, the path under gradients (the fast kernel's log-sum-exp carries none), and the
path on devices whose kernels we have not measured. It knows tensors only.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.soft_cap import capped


def attend_part(
    queries: Float[Tensor, "B G Q D"],
    keys: Float[Tensor, "B H S D"],
    values: Float[Tensor, "B H S E"],
    *,
    scale: float,
    mask: Bool[Tensor, "#B #G #Q S"] | None = None,
) -> tuple[Float[Tensor, "B G Q E"], Float[Tensor, "B G Q"]]:
    """Attention of every query over every slot it may see, and the log-sum-exp of its scores.

    `mask` is True where a query may look. A query that may look nowhere gets zeros and a log-sum-exp of -inf.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    group = queries.shape[1] // keys.shape[1]
    every_key = keys.to(wide).repeat_interleave(group, dim=1)  # B G S D
    every_value = values.to(wide).repeat_interleave(group, dim=1)  # B G S E
    scores = queries.to(wide) @ every_key.mT  # B G Q S
    scores = capped(scores * scale, scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    log_sum_exp = scores.logsumexp(dim=-1)  # B G Q
    # A query that may look nowhere has only scores of -inf, and -inf minus -inf would be NaN.
    sees_something = log_sum_exp.isfinite()
    subtracted = torch.where(sees_something, log_sum_exp, 0.0)
    log_weights = scores - subtracted[..., None]
    weights = log_weights.exp()
    output = weights @ every_value  # B G Q E
    return output.to(queries.dtype), log_sum_exp


def causal_mask(new: int, stored: int, device: torch.device) -> Bool[Tensor, "1 1 Q S"]:
    """Which slot each of the `new` newest tokens may see, when the last `new` of `stored` slots are those tokens."""
    first = stored - new
    query_slots = torch.arange(first, stored, device=device)
    slots = torch.arange(stored, device=device)
    visible = query_slots[:, None] >= slots  # Q S
    return visible[None, None]
