"""Attention over one part of a layer, with the log-sum-exp that lets parts be merged exactly.

On a CPU it is one call of torch's flash kernel on packed grouped queries [B, H, group x Q, D], about half the time of
the stock grouped-query path in float32 and a tenth in bfloat16. The kernel is private to torch and has traps (a row
masked everywhere returns a log-sum-exp of 0, no keys at all kill the process, no gradient through the log-sum-exp):
each is closed here and has a test. Elsewhere the reference runs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.reference import attend_part, causal_mask

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FAST_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class Partial:
    """What a set of queries read from one part: an average of its values, and how much weight that average has."""

    output: Float[Tensor, "B G Q E"]
    log_sum_exp: Float[Tensor, "B G Q"]  # float32 or wider; -inf where a query saw nothing


def partial(
    queries: Float[Tensor, "B G Q D"],
    keys: Float[Tensor, "B H S D"],
    values: Float[Tensor, "B H S D"],
    *,
    scale: float,
    causal: bool = False,
    mask: Bool[Tensor, "#B 1 #Q S"] | None = None,
) -> Partial:
    """Attention over one part. `mask` is True where a query may look; `causal` means the slots are the queries' own.

    `causal` with fewer queries than slots would be ambiguous and is not supported: give the earlier slots as a part.
    """
    assert not causal or queries.shape[2] == keys.shape[2], "causal attention is for new tokens against themselves"
    if keys.shape[2] == 0:
        return nothing(queries)
    if not _is_fast(queries, keys, values):
        if causal:
            triangle = causal_mask(queries.shape[2], keys.shape[2], keys.device)
            mask = triangle if mask is None else triangle & mask
        return Partial(*attend_part(queries, keys, values, scale=scale, mask=mask))
    if causal or (mask is not None and queries.shape[2] > 1):
        return _flash(queries, keys, values, scale=scale, causal=causal, mask=mask)
    packed = pack(queries, keys.shape[1])
    answer = _flash(packed, keys, values, scale=scale, causal=False, mask=mask)
    return Partial(answer.output.reshape(queries.shape), answer.log_sum_exp.reshape(queries.shape[:-1]))


def nothing(queries: Float[Tensor, "B G Q D"]) -> Partial:
    """What queries read from an empty part."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    empty = torch.full(queries.shape[:-1], -torch.inf, dtype=wide, device=queries.device)
    return Partial(torch.zeros_like(queries), empty)


def pack(queries: Float[Tensor, "B G Q D"], heads: int) -> Tensor:
    """Queries of one key/value head side by side, [B, H, group x Q, D], so that each key is read once for its group."""
    rows, _, new, size = queries.shape
    return queries.reshape(rows, heads, -1 if new else 0, size)


def _is_fast(*tensors: Tensor) -> bool:
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in _FAST_TYPES
        and all(tensor.dtype == first.dtype for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def _flash(
    queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> Partial:
    """One call of torch's kernel; a query that may look nowhere comes back as zeros with weight -inf."""
    if mask is None:
        return Partial(*_FLASH(queries, keys, values, 0.0, causal, scale=scale))
    if causal:
        mask = mask & causal_mask(queries.shape[2], keys.shape[2], keys.device)
    added = torch.zeros(mask.shape, dtype=queries.dtype).masked_fill_(~mask, -torch.inf)
    added = added.expand(queries.shape[0], 1, queries.shape[2], keys.shape[2])
    output, log_sum_exp = _FLASH(queries, keys, values, 0.0, False, attn_mask=added, scale=scale)
    blind = ~mask.any(dim=-1).expand(log_sum_exp.shape)  # B G Q
    if blind.any():
        log_sum_exp = log_sum_exp.masked_fill(blind, -torch.inf)
        output = output.masked_fill(blind[..., None], 0.0)
    return Partial(output, log_sum_exp)
