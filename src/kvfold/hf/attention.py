"""The attention and mask functions that transformers calls under the name "kvfold".

With a folded cache, attention stores the new rows and attends over everything the layer remembers; with anything
else it is the stock function. The mask function gives a small object that only stock tensors write out: for a folded
layer causality is known, and of the mask only its columns matter, which say what is a pad.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvfold.errors import CacheError, ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.cache import FoldedCache
from kvfold.hf.forward import NewColumns
from kvfold.hf.handle import NewRows
from kvfold.hf.passes import PassRows
from kvfold.memory.layer import NewTokens

NAME = "kvfold"

# Arguments that mean nothing to attention over a causal past. Any other that is set is refused, never ignored.
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_hidden_states",
        "return_dict",
        "num_items_in_batch",
        "logits_to_keep",
    }
)


def serve(model: PreTrainedModel) -> None:
    """Make a model call kvfold's functions. Its stock caches go on working as before."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    if ModelBinding.of(model).text_config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


class LazyMask:
    """A mask that was asked for and not yet written out."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.columns: Tensor | None = request.get("attention_mask")  # fed columns that are tokens; None when all are
        self.is_causal = request.get("mask_function", causal_mask_function) is causal_mask_function
        self._written: Tensor | None = None
        self._is_written = False

    def write(self) -> Tensor | None:
        """The mask as stock attention wants it, written once for all layers."""
        if not self._is_written:
            self._written = sdpa_mask(**self.request)
            self._is_written = True
        return self._written


def mask(*args: Any, **request: Any) -> LazyMask:
    """Called by transformers once a forward and kind of layer."""
    assert not args, "transformers gives mask arguments by name"
    return LazyMask(request)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: over a folded cache's memory, or the stock function over plain tensors."""
    if isinstance(key, PassRows):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return key.attend(query, scale=scale).transpose(1, 2).contiguous(), None
    if not isinstance(key, NewRows):
        written = attention_mask.write() if isinstance(attention_mask, LazyMask) else attention_mask
        return sdpa_attention_forward(module, query, key, value, written, dropout=dropout, scaling=scaling, **kwargs)
    cache, running = key.cache, key.cache.running
    _refuse(module, cache, attention_mask, dropout, kwargs)
    if running.columns is None:  # the first folding layer reads mask and positions for all
        columns = attention_mask.columns if isinstance(attention_mask, LazyMask) else None
        running.columns = _new_columns(cache, columns, kwargs.get("position_ids"), query)
    read = running.columns
    new = NewTokens(
        queries=query,
        keys=key.keys,
        values=key.values,
        positions=read.positions,
        valid=read.valid,
        hidden_states=cache.lease.take_hidden_states(key.index) if cache.lease.records_hidden_states else None,
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = running.forward.attend(key.index, new, scale=scale, valid=read.past)
    if key.index == running.last:
        running.commit()
    return output.transpose(1, 2).contiguous(), None


def _new_columns(cache: FoldedCache, columns: Tensor | None, positions: Tensor | None, query: Tensor) -> NewColumns:
    """Read a forward's mask and positions."""
    past, valid = _split(columns, cache.memory.fed, query.shape[2])
    return NewColumns(past=past, valid=valid, positions=_positions(cache, positions, valid, query))


def _split(columns: Tensor | None, fed: int, count: int) -> tuple[Tensor | None, Tensor | None]:
    """Validity of the earlier columns and of the new ones; None where nothing is a pad."""
    if columns is None:
        return None, None
    if columns.shape[1] != fed + count:
        raise CacheError(
            f"an attention mask of {columns.shape[1]} columns was given; {fed} were fed and {count} are new; "
            f"give one of {fed + count} columns, or none"
        )
    past, valid = columns[:, :fed], columns[:, fed:]
    return past, None if bool(valid.all()) else valid


def _positions(cache: FoldedCache, given: Tensor | None, valid: Tensor | None, query: Tensor) -> Tensor:
    """Where the new tokens stand in the text; refused where the model has no such position."""
    rows, count = query.shape[0], query.shape[2]
    if given is not None:
        positions = given
    else:
        seen = torch.tensor(cache.memory.seen or (0,) * rows, device=query.device)
        real = torch.ones(rows, count, dtype=torch.long, device=query.device) if valid is None else valid.long()
        positions = seen[:, None] + (real.cumsum(dim=1) - 1).clamp(min=0)
    limit = cache.lease.position_limit
    if limit is not None and cache.memory.fed + count > limit and int(positions.max()) >= limit:
        raise ModelError(
            f"a token was fed at position {int(positions.max())}; {cache.lease.name} has {limit} positions; "
            "start a new conversation or shorten the text: folding saves memory, not positions"
        )
    return positions


def _refuse(module: torch.nn.Module, cache: FoldedCache, given: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Everything that this attention would get wrong is an error."""
    lease = cache.lease
    if module not in lease.modules and not lease.has_module(module):  # a call less, in every layer of every step
        raise CacheError(
            f"a cache of {cache.lease.name} was used with another model; what it holds means nothing there; "
            "make a new one by kvfold.cache(model, ...)"
        )
    if isinstance(given, Tensor) or (isinstance(given, LazyMask) and not given.is_causal):
        raise CacheError(
            "a mask of another pattern than causal was given with a folded cache; folded layers are causal; "
            "give a mask of two dimensions that marks pads"
        )
    if dropout:
        raise CacheError(
            f"dropout={dropout} was asked for with a folded cache; it is for inference; call model.eval() first"
        )
    set_arguments = {name for name, value in kwargs.items() if value is not None and value is not False}
    strange = set_arguments - _HARMLESS - ({"is_causal"} if kwargs.get("is_causal") else set())
    if strange:
        raise CacheError(
            f"attention was called with {', '.join(sorted(strange))}; a folded layer does not know how to "
            "honour that; use the stock cache for this model or call"
        )
