"""Attention over one part of a layer, with the log-sum-exp that lets parts be merged exactly.

On a CPU it is one call of torch's flash kernel on packed grouped queries [B, H, group x Q, D], about half the time of
the stock grouped-query path in float32 and a tenth in bfloat16. The kernel is private to torch and has traps (a row
masked everywhere returns a log-sum-exp of 0, no keys at all kill the process, no gradient through the log-sum-exp):
each is closed here and has a test. CUDA has kernels of its own (cuda.py). Elsewhere the reference runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.cuda import attend_cuda, has_kernel
from kvfold.attention.reference import attend_part, causal_mask

Kernel: TypeAlias = Callable[..., tuple[Tensor, Tensor]]

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
    attend = _kernel_for(queries, keys, values)
    if causal and (mask is not None or attend is None):
        triangle = causal_mask(queries.shape[2], keys.shape[2], keys.device)
        mask, causal = triangle if mask is None else triangle & mask, False
    if attend is None:
        return Partial(*attend_part(queries, keys, values, scale=scale, mask=mask))
    apart = causal or (mask is not None and queries.shape[2] > 1)
    asked = queries if apart else pack(queries, keys.shape[1])
    output, log_sum_exp = attend(asked, keys, values, scale=scale, causal=causal, mask=mask)
    if mask is not None:
        blind = ~mask.any(dim=-1).expand(log_sum_exp.shape)  # B N Q
        if blind.any():
            log_sum_exp = log_sum_exp.masked_fill(blind, -torch.inf)
            output = output.masked_fill(blind[..., None], 0.0)
    return Partial(output.reshape(queries.shape), log_sum_exp.reshape(queries.shape[:-1]))


def nothing(queries: Float[Tensor, "B G Q D"]) -> Partial:
    """What queries read from an empty part."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    empty = torch.full(queries.shape[:-1], -torch.inf, dtype=wide, device=queries.device)
    return Partial(torch.zeros_like(queries), empty)


def pack(queries: Float[Tensor, "B G Q D"], heads: int) -> Tensor:
    """Queries of one key/value head side by side, [B, H, group x Q, D], so that each key is read once for its group."""
    rows, _, new, size = queries.shape
    return queries.reshape(rows, heads, -1 if new else 0, size)


def _kernel_for(*tensors: Tensor) -> Kernel | None:
    """What is quick on these tensors, if something is; no kernel gives gradients through the log-sum-exp."""
    first = tensors[0]
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if learning or any(tensor.dtype != first.dtype for tensor in tensors):
        return None
    if first.device.type == "cuda":
        return attend_cuda if has_kernel(*tensors) else None
    return _attend_cpu if first.device.type == "cpu" and first.dtype in _FAST_TYPES else None


def _attend_cpu(
    queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One call of torch's kernel; causal, or under a mask."""
    if mask is None:
        return _FLASH(queries, keys, values, 0.0, causal, scale=scale)
    added = torch.zeros(mask.shape, dtype=queries.dtype).masked_fill_(~mask, -torch.inf)
    added = added.expand(queries.shape[0], 1, queries.shape[2], keys.shape[2])
    return _FLASH(queries, keys, values, 0.0, False, attn_mask=added, scale=scale)
