"""A first state of the weights in which looking back is already possible, so that training need not discover it.

Layer 0 gets heads that attend one to four tokens back. Layers 1 and 2 get heads that find a place whose recent past is
like the present one, at stated distances, and copy what followed there. All of it is ordinary weights of a
stock Llama, free to change. Structured starts: Trockman and Kolter, Mimetic Initialization, https://arxiv.org/abs/2305.09828
Ours differs: heads are built for rotary positions, from a constant that all embeddings share.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_SPREAD = 0.08  # standard deviation of embeddings in their part of the width
_CONSTANT = 0.35  # what every embedding holds in its first dimension
_PEAK = (8.0, 6.0, 4.0, 4.0)  # logits of the fastest rotary pairs for looking back
_REACH = 500  # distance in tokens at which matching pairs have turned by a radian at most
_MATCH, _WRITE, _COPY = 2.0, 0.04, 0.06

# What a matching head compares, for each layer and KV head: (tokens back from here, tokens back from what is copied).
# "Anna's job is" against "Anna's job is V" and against "the job of Anna is V"; any token; a thing and its number.
_PLANS = {1: ((3, 4), (0, 1), (3, 2)), 2: ((1, 2), (2, 3))}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """How the width of the residual stream is divided: embeddings first, then a place for every look back."""

    width: int
    size: int  # of a head
    groups: int  # query heads of a key/value head
    rates: Float[Tensor, " half"]  # by which each rotary pair turns a token

    @property
    def embedded(self) -> int:
        """Dimensions that embeddings fill; each of the 2 * groups looks back has `size` dimensions after them."""
        return self.width - 2 * self.groups * self.size

    def reader(self, generator: torch.Generator) -> Float[Tensor, "size width"]:
        """Orthonormal rows that read the embeddings' part but for the constant dimension."""
        inside = self.embedded - 1
        square = torch.randn(inside, inside, generator=generator)
        rows = torch.linalg.qr(square).Q[: self.size]
        return nn.functional.pad(rows, (1, self.width - self.embedded))

    def place(self, look: int) -> Float[Tensor, "size width"]:
        """Rows that read the dimensions where a look back writes."""
        return torch.eye(self.width)[_rows(look, self.size, start=self.embedded)]


@torch.no_grad()
def look_back(model: Any, *, seed: int = 0) -> None:
    """Set embeddings and most heads of the first three layers of a Llama; the rest keeps its random start."""
    layers = model.model.layers
    shape = _shape(model.config)
    generator = torch.Generator().manual_seed(seed)
    _set_embeddings(model.model.embed_tokens.weight, shape.embedded, generator)
    read = shape.reader(generator)
    # The rows that read the token so many places back; 0 is the token itself.
    past = {0: read}
    for look in range(2 * shape.groups):
        past[look + 1] = shape.place(look)
        _look_back_head(layers[0].self_attn, look, shape, read)
    for depth, plans in _PLANS.items():
        for kv_head, plan in enumerate(plans):
            compared = (past[plan[0]], past[plan[1]])
            _matching_heads(layers[depth].self_attn, kv_head, shape, compared, shape.reader(generator))


def _shape(config: Any) -> _Shape:
    size = config.head_dim
    pairs = torch.arange(size // 2) / (size // 2)
    shape = _Shape(
        width=config.hidden_size,
        size=size,
        groups=config.num_attention_heads // config.num_key_value_heads,
        rates=config.rope_parameters["rope_theta"] ** -pairs,
    )
    assert shape.embedded > size, "the width must hold embeddings and a place for every look back"
    return shape


def _set_embeddings(embeddings: Tensor, embedded: int, generator: torch.Generator) -> None:
    """Random embeddings in their part of the width, with the constant in the first dimension."""
    embeddings.zero_()
    random = torch.randn(len(embeddings), embedded - 1, generator=generator)
    embeddings[:, 1:embedded] = random * _SPREAD
    embeddings[:, 0] = _CONSTANT


def _look_back_head(attention: Any, look: int, shape: _Shape, read: Tensor) -> None:
    """Let query head `look` attend `look + 1` tokens back and write what it reads there."""
    queries = _rows(look, shape.size)
    keys = _rows(look // shape.groups, shape.size)
    attention.k_proj.weight[keys] = _constant_rows(shape, distance=0)
    attention.q_proj.weight[queries] = _constant_rows(shape, distance=look + 1)
    attention.v_proj.weight[keys] = read
    attention.o_proj.weight[:, queries] = _WRITE * shape.place(look).mT


def _matching_heads(
    attention: Any, kv_head: int, shape: _Shape, compared: tuple[Tensor, Tensor], copied: Tensor
) -> None:
    """Let all query heads of a KV head attend where the past is alike, and copy the token there."""
    half = shape.size // 2
    # Only pairs that turn slowly match over the whole reach.
    slow = [pair for pair in range(half) if float(shape.rates[pair]) * _REACH <= 1.0]
    rows = slow + [pair + half for pair in slow]
    query = torch.zeros_like(copied)
    key = torch.zeros_like(copied)
    query[rows] = _MATCH * compared[0][rows]
    key[rows] = _MATCH * compared[1][rows]
    keys = _rows(kv_head, shape.size)
    attention.k_proj.weight[keys] = key
    attention.v_proj.weight[keys] = copied
    for head in range(kv_head * shape.groups, (kv_head + 1) * shape.groups):
        queries = _rows(head, shape.size)
        attention.q_proj.weight[queries] = query
        attention.o_proj.weight[:, queries] = _COPY * copied.mT


def _rows(head: int, size: int, *, start: int = 0) -> slice:
    begun = start + head * size
    return slice(begun, begun + size)


def _constant_rows(shape: _Shape, *, distance: int) -> Float[Tensor, "size width"]:
    """Queries or keys, the same for every token but for their rotation; two of them fit best `distance` apart."""
    # Layers are normed first, so the constant arrives divided by the root mean square of an embedding.
    squares = (shape.embedded - 1) * _SPREAD**2 + _CONSTANT**2
    rms = math.sqrt(squares / shape.width)
    out = torch.zeros(shape.size, shape.width)
    for pair, peak in enumerate(_PEAK):
        amplitude = math.sqrt(peak * math.sqrt(shape.size)) * rms / _CONSTANT
        angle = -distance * float(shape.rates[pair])
        out[pair, 0] = amplitude * math.cos(angle)
        out[pair + shape.size // 2, 0] = amplitude * math.sin(angle)
    return out
