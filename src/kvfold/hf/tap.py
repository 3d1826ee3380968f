"""Tap: for a while, the full-attention layers of a model call a function of the caller's with their queries and rows.

Training and calibration look at keys and values there, and put others in their place. Sliding layers stay stock. No
cache is involved; nothing is left behind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold.hf.attention import mask
from kvfold.hf.binding import ModelBinding

NAME = "kvfold-tap"

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor, float], Float[Tensor, "B G Q D"]]  # layer, q, k, v, scale

_TAPS: ContextVar[tuple[frozenset[int], Attend] | None] = ContextVar("tap", default=None)


@contextmanager
def tapped(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Inside, every full-attention layer of the model answers by `attend`."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, mask)
    before = ModelBinding.of(model).text_config._attn_implementation
    model.set_attn_implementation(NAME)
    token = _TAPS.set((frozenset(folding_layers(model)), attend))
    try:
        yield
    finally:
        _TAPS.reset(token)
        model.set_attn_implementation(before or "sdpa")


def folding_layers(model: PreTrainedModel) -> list[int]:
    """The layers that fold."""
    return list(ModelBinding.of(model).folding_layers)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
               scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    tap = _TAPS.get()
    assert tap is not None, "a tapped model runs inside its tap"
    layers, attend = tap
    index: Any = module.layer_idx
    if index not in layers:
        written = attention_mask.write() if attention_mask is not None else None
        return sdpa_attention_forward(module, query, key, value, written, dropout=dropout, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(index, query, key, value, scale).transpose(1, 2).contiguous(), None
