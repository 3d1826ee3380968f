"""Attention over one part on CUDA, by torch's own kernels, with the log-sum-exp that merging needs.

Few queries over many slots (a step of decoding) are two batched products, or the flash kernel in half precision, which
splits long parts over the whole card. Many queries are the flash kernel in half precision and the memory-efficient one
in float32 or under a mask. Products of half precision are summed and given in float32: a score of 8 bits is too coarse.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCORES = 1 << 26  # scores that are written out at a time: 256 MiB of float32
_ALIGNED = 16  # columns by which the kernel wants a row of its bias to be a multiple
_MAJOR, _MINOR = torch.__version__.split(".")[:2]
_GIVES_WIDE = (int(_MAJOR), int(_MINOR)) >= (2, 8)  # from there torch.bmm of half precision can give float32


def has_kernel(*tensors: Tensor) -> bool:
    """Whether tensors of one dtype on CUDA are of a type and of sizes that the kernels take."""
    sizes = {tensor.shape[-1] for tensor in tensors}
    if tensors[0].dtype not in _TYPES or len(sizes) != 1:
        return False
    (size,) = sizes
    return size % 8 == 0 and size <= 256


def attend_cuda(
    queries: Float[Tensor, "B G Q D"],
    keys: Float[Tensor, "B H S D"],
    values: Float[Tensor, "B H S D"],
    *,
    scale: float,
    causal: bool,
    mask: Bool[Tensor, "#B 1 #Q S"] | None,
) -> tuple[Float[Tensor, "B G Q D"], Float[Tensor, "B G Q"]]:
    """Output and log-sum-exp, causal or under a mask. The answer of a query that may look nowhere is undefined."""
    if mask is None and queries.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        answer = flash(queries, keys, values, 0.0, causal, False, scale=scale)
        return answer[0], answer[1]
    rows, query_heads, new, _ = queries.shape
    heads, stored = keys.shape[1:3]
    packed = query_heads == heads
    scores = rows * query_heads * new * stored
    if packed and not causal and scores <= _SCORES:
        return _attend_by_products(queries, keys, values, scale=scale, mask=mask)
    group = query_heads // heads
    keys = keys.repeat_interleave(group, dim=1)  # this kernel takes a key/value head for every query head
    values = values.repeat_interleave(group, dim=1)
    bias = None if mask is None else _bias(mask, queries, stored)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    answer = efficient(queries, keys, values, bias, True, 0.0, causal, scale=scale)
    return answer[0], answer[1][..., :new]  # it pads the queries' log-sum-exps


def wide_product(
    left: Float[Tensor, "N rows inner"],
    right: Float[Tensor, "N inner columns"],
) -> Float[Tensor, "N rows columns"]:
    """A batched product of one dtype, in float32."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if _GIVES_WIDE and left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def _attend_by_products(
    queries: Float[Tensor, "B H Q D"],
    keys: Float[Tensor, "B H S D"],
    values: Float[Tensor, "B H S D"],
    *,
    scale: float,
    mask: Bool[Tensor, "#B 1 #Q S"] | None,
) -> tuple[Float[Tensor, "B H Q D"], Float[Tensor, "B H Q"]]:
    """Attention as two batched products, with all scores written out."""
    rows_and_heads = queries.shape[:2]
    packed = queries.flatten(0, 1)  # N Q D
    product = wide_product(packed, keys.flatten(0, 1).mT)  # N Q S
    scores = product.unflatten(0, rows_and_heads)
    scores = scores * scale
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf: a query that may look nowhere would become NaN
        scores = scores.masked_fill(~mask, lowest)
    log_sum_exp = scores.logsumexp(dim=-1)
    weights = (scores - log_sum_exp[..., None]).exp_()
    weights = weights.to(values.dtype)
    product = wide_product(weights.flatten(0, 1), values.flatten(0, 1))  # N Q D
    output = product.unflatten(0, rows_and_heads)
    return output.to(queries.dtype), log_sum_exp


def _bias(
    mask: Bool[Tensor, "#B 1 #Q S"],
    queries: Float[Tensor, "B G Q D"],
    slots: int,
) -> Float[Tensor, "B G Q S"]:
    """The mask as numbers that are added to scores, its rows as long in memory as the kernel wants them."""
    rows, heads, new, _ = queries.shape
    width = -(-slots // _ALIGNED) * _ALIGNED  # slots, rounded up
    bias = torch.zeros(
        rows,
        1,  # the same for every head
        new,
        width,
        dtype=queries.dtype,
        device=queries.device,
    )
    shown = bias[..., :slots]
    shown.masked_fill_(~mask, -torch.inf)
    return shown.expand(-1, heads, -1, -1)
