"""The parallel pass of training: a model over embeddings and a written-out mask, with somebody looking on.

For the pass a model uses an attention function that is the stock one, and also shows queries, keys and values after
their rotation to the observer of the calling thread. Nothing is kept on the module. Knows no method and no loss.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvfold_parallel"
Observer = Callable[[int, Tensor, Tensor, Tensor, float], None]  # layer, queries, keys, values, scale

_MASKS: ContextVar[Mapping[int, Tensor] | None] = ContextVar("who sees whom in a parallel pass", default=None)
_OBSERVER: ContextVar[Observer | None] = ContextVar("observer of a parallel pass", default=None)


def prepare(model: PreTrainedModel) -> None:
    """Make a model use the function that shows what it attends with."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


@contextlib.contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """Inside, every layer's queries, keys and values are shown to the observer."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def run(
    model: Any,
    *,
    positions: Int[Tensor, "B Q"],
    masks: Mapping[int, Bool[Tensor, "B H Q Q"] | Float[Tensor, "B H Q Q"]] | None = None,
    ids: Int[Tensor, "B Q"] | None = None,
    embeddings: Float[Tensor, "B Q width"] | None = None,
) -> Float[Tensor, "B Q width"]:
    """The last hidden states of a forward without a cache; no masks mean plain causal attention.

    `masks` has one for each layer, and for each of its key/value heads or one for all: what is seen, or what is added
    to scores. The model itself is given ones:
    jumps in positions would else be read as packed sequences.
    """
    ones, decoder = torch.ones_like(positions), model.get_decoder()
    token = _MASKS.set(masks)
    try:
        output = decoder(
            input_ids=ids, inputs_embeds=embeddings, position_ids=positions, attention_mask=ones, use_cache=False
        )
    finally:
        _MASKS.reset(token)
    return output.last_hidden_state


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    observer = _OBSERVER.get()
    if observer is not None:
        observer(module.layer_idx, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    masks, kernels = _MASKS.get(), contextlib.nullcontext()
    if masks is not None:
        if (
            query.device.type == "cuda"
        ):  # its memory-efficient kernel fails in the backward pass of a mask with a gradient
            kernels = sdpa_kernel(SDPBackend.MATH)
        own = masks[module.layer_idx]
        attention_mask = own if own.shape[1] == 1 else own.repeat_interleave(query.shape[1] // own.shape[1], dim=1)
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.to(query.dtype)
    with kernels:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
