"""Attention over one part of a layer, with the log-sum-exp that lets parts be merged exactly.

On a CPU it is one call of torch's flash kernel on packed grouped queries [B, H, group x Q, D], about half the time of
the stock grouped-query path in float32 and a tenth in bfloat16. The kernel is private to torch and has traps: a row
masked everywhere returns a log-sum-exp of 0, no keys or no queries kill the process, the log-sum-exp has no gradient.
Each is closed here and has a test. CUDA has kernels of its own (kernels/cuda.py). Elsewhere the reference runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.kernels.cuda import attend_cuda, has_kernel
from kvfold.attention.reference import attend_part, causal_mask
from kvfold.attention.soft_cap import CappedScale

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_SCORES = 1 << 26  # scores that are written out at a time: 256 MiB of float32
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
    sighted: bool = False,
) -> Partial:
    """Attention over one part. `mask` is True where a query may look; `causal` means the slots are the queries' own.

    `sighted` promises that no query is masked everywhere, so that nobody has to wait for the answer of a card.
    `causal` with fewer queries than slots would be ambiguous and is not supported: give the earlier slots as a part.
    """
    rows, query_heads, new, size = queries.shape
    heads, stored = keys.shape[1:3]
    assert not causal or new == stored, "causal attention is for new tokens against themselves"
    if stored == 0 or new == 0:
        return nothing(queries)
    same_type = queries.dtype == keys.dtype == values.dtype
    plain = same_type and queries.dtype in _FAST_TYPES and queries.device.type == "cpu" and not torch.is_grad_enabled()
    fast = plain or _has_kernel(queries, keys, values)  # the first is a step of decoding, which need not ask further
    fast = fast and type(scale) is not CappedScale  # no kernel bends scores
    if causal and (mask is not None or not fast):
        triangle = causal_mask(new, stored, keys.device)
        mask = triangle if mask is None else triangle & mask
        causal = False
    if not fast:
        return _by_reference(queries, keys, values, scale, mask)
    asked = queries
    if not causal and (mask is None or new == 1):  # all queries of a group see the same slots
        # They lie side by side under their key/value head, so that each key is read once for its group.
        asked = queries.reshape(rows, heads, query_heads // heads * new, size)  # B, H, group x Q, D
    if queries.device.type == "cuda":
        output, log_sum_exp = attend_cuda(asked, keys, values, scale=scale, causal=causal, mask=mask)
    else:
        bias = None if mask is None else _bias(mask, queries, stored)
        output, log_sum_exp = _FLASH(asked, keys, values, 0.0, causal, attn_mask=bias, scale=scale)
    if mask is not None and not sighted:
        output, log_sum_exp = _without_blind(output, log_sum_exp, mask)
    output = output.reshape(queries.shape)
    log_sum_exp = log_sum_exp.reshape(queries.shape[:-1])
    return Partial(output, log_sum_exp)


def joined(answers: Sequence[Partial]) -> Partial:
    """Put what some queries read before what later ones read."""
    if len(answers) == 1:
        return answers[0]
    output = torch.cat([answer.output for answer in answers], dim=2)
    log_sum_exp = torch.cat([answer.log_sum_exp for answer in answers], dim=2)
    return Partial(output, log_sum_exp)


def _by_reference(queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Partial:
    """Attend with scores written out, of so many queries at a time as memory bears."""
    new = queries.shape[2]
    step = max(_SCORES // (queries.shape[0] * queries.shape[1] * keys.shape[2]), 1)
    if new <= step:
        return Partial(*attend_part(queries, keys, values, scale=scale, mask=mask))
    pieces = []
    for start in range(0, new, step):
        some = slice(start, start + step)
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, some]
        read = attend_part(queries[:, :, some], keys, values, scale=scale, mask=seen)
        pieces.append(Partial(*read))
    return joined(pieces)


def _without_blind(
    output: Float[Tensor, "B G Q D"],
    log_sum_exp: Float[Tensor, "B G Q"],
    mask: Bool[Tensor, "#B 1 #Q S"],
) -> tuple[Tensor, Tensor]:
    """Let queries that may look nowhere weigh nothing in a merge: kernels give them any finite answer."""
    blind = ~mask.any(dim=-1).expand(log_sum_exp.shape)
    if blind.any():
        log_sum_exp = log_sum_exp.masked_fill(blind, -torch.inf)
        output = output.masked_fill(blind[..., None], 0.0)
    return output, log_sum_exp


def nothing(queries: Float[Tensor, "B G Q D"]) -> Partial:
    """Partial attention over no slots at all: zeros that weigh nothing."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    log_sum_exp = torch.full(
        queries.shape[:-1],
        -torch.inf,
        dtype=wide,
        device=queries.device,
    )
    return Partial(torch.zeros_like(queries), log_sum_exp)


def softmax_sinks(queries: Float[Tensor, "B G Q D"], logits: Float[Tensor, " G"]) -> Partial:
    """Partial attention over a learned logit of each query head that has a weight and no value (gpt-oss)."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    log_sum_exp = logits.to(wide)[:, None].expand(queries.shape[:-1])
    return Partial(torch.zeros_like(queries), log_sum_exp)


def _has_kernel(*tensors: Tensor) -> bool:
    """Whether a fast kernel takes these tensors; none gives gradients through the log-sum-exp."""
    first = tensors[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return False
    if first.device.type == "cuda":
        return has_kernel(*tensors)
    return first.device.type == "cpu" and first.dtype in _FAST_TYPES


def _bias(
    mask: Bool[Tensor, "#B 1 #Q S"],
    queries: Float[Tensor, "B G Q D"],
    stored: int,
) -> Float[Tensor, "B 1 Q S"]:
    """The mask as numbers that the CPU kernel adds to scores: 0 where a query may look, -inf elsewhere."""
    rows, _, new, _ = queries.shape
    bias = torch.zeros(mask.shape, dtype=queries.dtype)
    bias.masked_fill_(~mask, -torch.inf)
    return bias.expand(rows, 1, new, stored)
