"""The parallel pass of training: a model over embeddings and a written-out mask, with somebody looking on.

For the pass a model uses an attention function that is the stock one, and also shows queries, keys and values after
their rotation to the observer of the calling thread. Nothing is kept on the module. Knows no method and no loss.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvfold_parallel"
Observer = Callable[[int, Tensor, Tensor, Tensor, float], None]  # layer, queries, keys, values, scale

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
    mask: Bool[Tensor, "B 1 Q Q"] | None = None,
    ids: Int[Tensor, "B Q"] | None = None,
    embeddings: Float[Tensor, "B Q width"] | None = None,
) -> Float[Tensor, "B Q width"]:
    """The last hidden states of a forward without a cache; no mask means plain causal attention.

    Without a mask a mask of ones is given: jumps in positions would else be read as packed sequences.
    """
    if mask is None:
        rows = ids if ids is not None else positions
        given: Tensor = torch.ones_like(rows)
    else:
        given = mask
    decoder = model.get_decoder()
    output = decoder(
        input_ids=ids, inputs_embeds=embeddings, position_ids=positions, attention_mask=given, use_cache=False
    )
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
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
