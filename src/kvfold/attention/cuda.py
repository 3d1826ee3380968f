"""Attention over one part on CUDA, by torch's own kernels, with the log-sum-exp that merging needs.

Few queries over many slots (a step of decoding) are two batched products, or the flash kernel in half precision, which
splits long parts over the whole card. Many queries are the flash kernel in half precision and the memory-efficient one
in float32 or under a mask. Products of half precision are summed and given in float32: a score of 8 bits is too coarse.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCORES = 1 << 26  # scores that are written out at a time
_ALIGNED = 16  # columns by which the kernel wants a row of its bias to be a multiple
_GIVES_WIDE = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 8)


def has_kernel(*tensors: Tensor) -> bool:
    """Whether tensors of one dtype on CUDA are of a type and of sizes that the kernels take."""
    sizes = {one.shape[-1] for one in tensors}
    return tensors[0].dtype in _TYPES and len(sizes) == 1 and max(sizes) % 8 == 0 and max(sizes) <= 256


def attend_cuda(
    queries: Float[Tensor, "B N Q D"],
    keys: Float[Tensor, "B H S D"],
    values: Float[Tensor, "B H S D"],
    *,
    scale: float,
    causal: bool,
    mask: Bool[Tensor, "#B 1 #Q S"] | None,
) -> tuple[Float[Tensor, "B N Q D"], Float[Tensor, "B N Q"]]:
    """Output and log-sum-exp, causal or under a mask; N is a multiple of H.

    What a query gives that may look nowhere is not said.
    """
    if mask is None and queries.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(queries, keys, values, 0.0, causal, False, scale=scale)[:2]
    if not causal and queries.shape[1] == keys.shape[1] and queries[..., 0].numel() * keys.shape[2] <= _SCORES:
        return _by_products(queries, keys, values, scale, mask)
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    bias = None if mask is None else _bias(mask, queries, keys.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    output, log_sum_exp = efficient(queries, keys, values, bias, True, 0.0, causal, scale=scale)[:2]
    return output, log_sum_exp[..., : queries.shape[2]]


def wide_product(left: Float[Tensor, "N a b"], right: Float[Tensor, "N b c"]) -> Float[Tensor, "N a c"]:
    """A batched product of one dtype, in float32."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if _GIVES_WIDE and left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def _by_products(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, heads = queries.shape[:2]
    scores = wide_product(queries.flatten(0, 1), keys.flatten(0, 1).mT).unflatten(0, (rows, heads)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    log_sum_exp = scores.logsumexp(dim=-1)
    weights = (scores - log_sum_exp[..., None]).exp_().to(values.dtype)
    output = wide_product(weights.flatten(0, 1), values.flatten(0, 1)).unflatten(0, (rows, heads))
    return output.to(queries.dtype), log_sum_exp


def _bias(mask: Tensor, queries: Tensor, slots: int) -> Tensor:
    """The mask as what is added to scores, its rows as long as the kernel wants them."""
    width = -(-slots // _ALIGNED) * _ALIGNED
    bias = torch.zeros(*queries.shape[:1], 1, queries.shape[2], width, dtype=queries.dtype, device=queries.device)
    shown = bias[..., :slots]
    shown.masked_fill_(~mask, -torch.inf)
    return shown.expand(-1, queries.shape[1], -1, -1)
