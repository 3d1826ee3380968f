"""Probe: a forward without a cache in which a caller observes, replaces or masks the attention of a model.

`observe_attention` shows queries, keys and values of every full-attention layer, after their rotation, and
`replace_attention` takes its output from the caller; sliding layers stay stock. `parallel_forward` runs the decoder
over ids or embeddings, with a mask for each layer. The attention implementation that the model had is put back
on exit, and what a probe does is seen by the calling thread alone. Knows no method, no loss and no cache.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.decoder import decoder_of

NAME = "kvfold-probe"

# The arguments are the layer's index, queries [B G Q D], keys and values [B H Q D], and the scale of the scores.
Observer: TypeAlias = Callable[[int, Tensor, Tensor, Tensor, float], None]
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor, float], Float[Tensor, "B G Q D"]]
Masks: TypeAlias = Mapping[int, Bool[Tensor, "B H Q Q"] | Float[Tensor, "B H Q Q"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """What the attention function does besides the stock attention."""

    layers: frozenset[int] = frozenset()  # the full-attention layers, which are observed or replaced
    observer: Observer | None = None
    attend: Attend | None = None
    masks: Masks | None = None


_STOCK = _Probe()
_PROBE: ContextVar[_Probe] = ContextVar("what is done with attention", default=_STOCK)


@contextlib.contextmanager
def observe_attention(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Inside, `observer` gets queries, keys and values of every full-attention layer."""
    with _probed(model, observer=observer):
        yield


@contextlib.contextmanager
def replace_attention(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Inside, `attend` computes the attention output of every full-attention layer."""
    with _probed(model, attend=attend):
        yield


def parallel_forward(
    model: Any,
    *,
    positions: Int[Tensor, "B Q"],
    masks: Masks | None = None,
    ids: Int[Tensor, "B Q"] | None = None,
    embeddings: Float[Tensor, "B Q width"] | None = None,
) -> Float[Tensor, "B Q width"]:
    """Run the decoder without a cache and return its last hidden states; no masks mean plain causal attention.

    `masks` has one for each layer, and for each key/value head or one for all. A boolean mask is True where a query
    sees a key; a float mask is added to the scores.
    """
    # With a two-dimensional mask of ones, transformers does not take jumps in positions for packed sequences.
    ones = torch.ones_like(positions)
    with _probed(model, masks=masks):
        output = decoder_of(model)(
            input_ids=ids,
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=ones,
            use_cache=False,
        )
    return output.last_hidden_state


@contextlib.contextmanager
def _probed(model: PreTrainedModel, **changes: Any) -> Iterator[None]:
    """Inside, the model calls `_attention`, with these changes to what the thread's probe does already."""
    probe = replace(_PROBE.get(), layers=frozenset(ModelBinding.of(model).folding_layers), **changes)
    token = _PROBE.set(probe)
    try:
        with _implementation(model):
            yield
    finally:
        _PROBE.reset(token)


@contextlib.contextmanager
def _implementation(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the decoder attends by `_attention`. Vision towers and the like keep what they have."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    decoder: Any = decoder_of(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The stock function, but for what the probe of the calling thread says."""
    probe = _PROBE.get()
    index: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bent = [name for name in ("softcap", "s_aux") if more.get(name) is not None]
    if bent:
        raise ModelError(
            f"a method was to learn from the attention of a {type(module).__name__}; it attends with {bent[0]}, which "
            "is not learned with; use a method that learns nothing of a model"
        )
    if index in probe.layers:
        if probe.observer is not None:
            probe.observer(index, query, key, value, scale)
        if probe.attend is not None:
            return probe.attend(index, query, key, value, scale).transpose(1, 2).contiguous(), None
    if probe.masks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    seen = _mask_of_queries(probe.masks[index], query)
    with _kernels_for_masks(query):
        return sdpa_attention_forward(module, query, key, value, seen, scaling=scaling, **more)


def _kernels_for_masks(query: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, attention by a mask that may have a gradient is right: CUDA's memory-efficient kernel fails there."""
    return sdpa_kernel(SDPBackend.MATH) if query.device.type == "cuda" else contextlib.nullcontext()


def _mask_of_queries(given: Tensor, query: Tensor) -> Tensor:
    """Give the mask of a layer, one for each query head where it has one for each key/value head."""
    if given.shape[1] > 1:
        given = given.repeat_interleave(query.shape[1] // given.shape[1], dim=1)
    return given if given.dtype == torch.bool else given.to(query.dtype)
