"""A first state of the weights in which looking back is already possible, so that training need not discover it.

Layer 0 gets heads that attend one to four tokens back. Layers 1 and 2 get heads that find a place whose recent past is
like the present one, at stated distances, and copy what followed there. All of it is ordinary weights of a
stock Llama, free to change. Structured starts: Trockman and Kolter, Mimetic Initialization, https://arxiv.org/abs/2305.09828
Ours differs: heads are built for rotary positions, from a constant that all embeddings share.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_SPREAD = 0.08  # standard deviation of embeddings in their own part of the width
_CONSTANT = 0.35  # what every embedding holds in its first dimension
_PEAK = (8.0, 6.0, 4.0, 4.0)  # logits of the fastest rotary pairs for looking back
_REACH = 500  # distance in tokens at which matching pairs have turned by a radian at most
_MATCH, _WRITE, _COPY = 2.0, 0.04, 0.06

# What a matching head compares, for each layer and KV head: (tokens back from here, tokens back from what is copied).
# "Anna's job is" against "Anna's job is V" and against "the job of Anna is V"; any token; a thing and its number.
_PLANS = {1: ((3, 4), (0, 1), (3, 2)), 2: ((1, 2), (2, 3))}


@torch.no_grad()
def look_back(model: Any, *, seed: int = 0) -> None:
    """Set embeddings and most heads of the first three layers of a Llama; the rest keeps its random start."""
    config, layers = model.config, model.model.layers
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.model.embed_tokens.weight
    size, width, groups = config.head_dim, config.hidden_size, config.num_attention_heads // config.num_key_value_heads
    own = width - 2 * groups * size  # embeddings fill these dimensions; each look back has `size` of its own after them
    assert own > size, "the width must hold embeddings and a place for every look back"
    embeddings.zero_()
    embeddings[:, 1:own] = torch.randn(len(embeddings), own - 1, generator=generator) * _SPREAD
    embeddings[:, 0] = _CONSTANT
    rates = config.rope_parameters["rope_theta"] ** -(torch.arange(size // 2) / (size // 2))
    read = _orthogonal(size, own, width, generator)
    past = {0: read}
    for distance in range(1, 2 * groups + 1):
        past[distance] = torch.eye(width)[_rows(distance - 1, size, start=own)]
        _look_back_head(layers[0].self_attn, distance - 1, groups, read, past[distance], rates, own)
    for depth, plans in _PLANS.items():
        for group, plan in enumerate(plans):
            copied = _orthogonal(size, own, width, generator)
            _matching_heads(layers[depth].self_attn, group, groups, plan, past, copied, rates)


def _look_back_head(
    attention: Any, head: int, groups: int, read: Tensor, written: Tensor, rates: Tensor, own: int
) -> None:
    """Let query head `head` attend `head + 1` tokens back and write what it reads there."""
    size = len(read)
    queries, keys = _rows(head, size), _rows(head // groups, size)
    attention.k_proj.weight[keys] = _constant_rows(attention.k_proj.weight[keys], rates, distance=0, own=own)
    attention.q_proj.weight[queries] = _constant_rows(
        attention.q_proj.weight[queries], rates, distance=head + 1, own=own
    )
    attention.v_proj.weight[keys] = read
    attention.o_proj.weight[:, queries] = _WRITE * written.mT


def _matching_heads(
    attention: Any,
    group: int,
    groups: int,
    plan: tuple[int, int],
    past: dict[int, Tensor],
    copied: Tensor,
    rates: Tensor,
) -> None:
    """Let all query heads of a KV head attend where the past is alike, and copy the token there."""
    size = len(copied)
    slow = [pair for pair in range(size // 2) if float(rates[pair]) * _REACH <= 1.0]
    query, key = torch.zeros_like(copied), torch.zeros_like(copied)
    rows = slow + [pair + size // 2 for pair in slow]
    query[rows], key[rows] = _MATCH * past[plan[0]][rows], _MATCH * past[plan[1]][rows]
    keys = _rows(group, size)
    attention.k_proj.weight[keys] = key
    attention.v_proj.weight[keys] = copied
    for head in range(group * groups, (group + 1) * groups):
        attention.q_proj.weight[_rows(head, size)] = query
        attention.o_proj.weight[:, _rows(head, size)] = _COPY * copied.mT


def _rows(head: int, size: int, *, start: int = 0) -> slice:
    return slice(start + head * size, start + (head + 1) * size)


def _orthogonal(rows: int, own: int, width: int, generator: torch.Generator) -> Float[Tensor, "rows width"]:
    """Orthonormal rows that read the embeddings' own part but for the constant dimension."""
    square = torch.randn(own - 1, own - 1, generator=generator)
    return nn.functional.pad(torch.linalg.qr(square).Q[:rows], (1, width - own))


def _constant_rows(weight: Tensor, rates: Tensor, *, distance: int, own: int) -> Tensor:
    """Queries or keys, the same for every token but for their rotation; two of them fit best `distance` apart."""
    size, width = weight.shape
    rms = math.sqrt(((own - 1) * _SPREAD**2 + _CONSTANT**2) / width)
    out = torch.zeros_like(weight)
    for pair, peak in enumerate(_PEAK):
        amplitude = math.sqrt(peak * math.sqrt(size)) * rms / _CONSTANT
        angle = -distance * float(rates[pair])
        out[pair, 0], out[pair + size // 2, 0] = amplitude * math.cos(angle), amplitude * math.sin(angle)
    return out
