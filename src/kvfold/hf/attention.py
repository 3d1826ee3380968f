"""The attention and mask functions that transformers calls for a model that folded caches are used with.

With a folded cache, attention stores the new rows and attends over everything the layer remembers. Every other call
goes through the attention that the model had before, keyword for keyword: stock caches, static ones, no cache at all. A
folded cache says that a mask is for it by the length it gives, so that nothing is guessed and nothing is shared
between threads; its mask is a small object of which only the columns matter, which say what is a pad.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.attention.soft_cap import with_cap
from kvfold.errors import CacheError, ModelError
from kvfold.hf.attention_name import PREFIX, StandingName, refuse_unserved
from kvfold.hf.batched import BatchedRows
from kvfold.hf.binding import ModelBinding
from kvfold.hf.cache import FoldedCache
from kvfold.hf.forward import NewColumns
from kvfold.hf.handle import CapturedRows, FoldedLength, NewRows
from kvfold.hf.hooks import ForwardHook
from kvfold.hf.passes import PassRows
from kvfold.hf.refusals import why_positions_end
from kvfold.memory.layer import NewTokens

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


class AttentionService(ForwardHook):
    """Lets a model's attention branch on folded caches while one is alive. It changes: it counts them.

    Everything else goes through what the model had before, which it gets back with the last cache.
    """

    def __init__(self, model: "weakref.ref[PreTrainedModel]") -> None:
        super().__init__()
        self._model = model

    @classmethod
    def of(cls, model: PreTrainedModel) -> "AttentionService":
        """Give the one service of a model. Raises ModelError for an attention that nothing can stand in front of."""
        refuse_unserved(model)
        known = weakref.ref(model)  # what a binding has learned must not keep its model alive
        return ModelBinding.of(model).learned("attention", lambda: cls(known))

    def acquire(self) -> None:
        """Count one more cache. Where somebody has set another attention since, it is taken for what was before."""
        super().acquire()
        self.register()

    def register(self) -> Sequence["_Restoring"]:
        """Put our functions in front of the model's attention, unless they are there."""
        model = self._model()
        assert model is not None, "a cache is made of a model that is there"
        before = ModelBinding.of(model).text_config._attn_implementation or "sdpa"
        if not before.startswith(PREFIX):
            name = StandingName(PREFIX + before)
            AttentionInterface.register(name, _attention_over(before))
            AttentionMaskInterface.register(name, _mask_over(before))
            model.set_attn_implementation(name)
        return (_Restoring(self._model),)

    def __call__(self, *args: Any) -> None:
        """Never called by torch: the functions are called by transformers."""


@dataclass(frozen=True, slots=True)
class _Restoring:
    """What is removed with the last cache: our functions."""

    model: "weakref.ref[PreTrainedModel]"

    def remove(self) -> None:
        """Give the model back the attention that it had before."""
        model = self.model()
        if model is None:
            return
        now = ModelBinding.of(model).text_config._attn_implementation or ""
        if now.startswith(PREFIX):
            model.set_attn_implementation(now.removeprefix(PREFIX))


class FoldedMask:
    """The mask of a forward with a folded cache: never written out, for folded layers are causal."""

    def __init__(self, request: dict[str, Any], write: Callable[..., Any]) -> None:
        self.columns: Tensor | None = request.get("attention_mask")  # fed columns that are tokens; None when all are
        self.is_causal = _is_causal(request)
        self._request, self._write = request, write
        self._written: Any = self

    def written(self) -> Any:
        """Write the mask as the stock layers of the same forward want it, once for all of them."""
        if self._written is self:
            self._written = self._write(**self._request)
        return self._written


def _is_causal(request: dict[str, Any]) -> bool:
    """Tell whether the mask that is asked for is the causal one, up to pads."""
    if request.get("mask_function", causal_mask_function) is causal_mask_function:
        return True
    # Families with images ask for a pattern of their own also where there is no image: then it is causal after all.
    write: Any = sdpa_mask
    whole = {**request, "allow_is_causal_skip": False, "kv_length": int(request["kv_length"])}
    return torch.equal(write(**whole), write(**{**whole, "mask_function": causal_mask_function}))


def _mask_over(before: str) -> Callable[..., Any]:
    """Make the mask function of models whose attention was `before`."""
    stock: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[before]

    def mask(*args: Any, **request: Any) -> Any:
        if isinstance(request.get("kv_length"), FoldedLength):
            return FoldedMask(request, stock)
        return stock(*args, **request)

    return mask


def _attention_over(before: str) -> Callable[..., Any]:
    """Make the attention function of models whose attention was `before`."""

    def attention(
        module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if isinstance(key, NewRows):
            return _outside_graphs(module, query, key, attention_mask, **kwargs), None
        if isinstance(key, BatchedRows):
            return _batched(before, module, query, key, attention_mask, kwargs), None
        if isinstance(key, CapturedRows):
            return _captured(module, query, key, attention_mask, **kwargs), None
        if isinstance(key, PassRows):
            scale = _scale_of(query, kwargs.get("scaling"), kwargs.get("softcap"))
            output = key.attend(query, scale=scale, sink_logits=kwargs.get("s_aux"))
            return output.transpose(1, 2).contiguous(), None
        if isinstance(attention_mask, FoldedMask):  # a stock layer beside folding ones
            attention_mask = attention_mask.written()
        return _stock(before, module)(module, query, key, value, attention_mask, **kwargs)

    return attention


def _stock(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    """Find the attention function that a module called before; eager ones lie beside the module's class."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ModelError(
        f"eager attention was asked of {type(module).__name__}; its file has none; "
        'load the model with attn_implementation="sdpa"'
    )


def _folded(
    module: torch.nn.Module,
    query: Tensor,
    rows: NewRows,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attend in one folding layer, which takes the new rows."""
    cache, running = rows.cache, rows.cache.running
    _refuse(module, cache, attention_mask, dropout, kwargs)
    if running.columns is None:  # the first folding layer reads mask and positions for all
        columns = attention_mask.columns if isinstance(attention_mask, FoldedMask) else None
        running.columns = _new_columns(cache, columns, kwargs.get("position_ids"), query)
    read = running.columns
    new = NewTokens(
        queries=query,
        keys=rows.keys,
        values=rows.values,
        positions=read.positions,
        valid=read.valid,
        hidden_states=cache.lease.take_hidden_states(rows.index) if cache.lease.records_hidden_states else None,
        sink_logits=s_aux,
    )
    scale = scaling if scaling is not None and softcap is None else _scale_of(query, scaling, softcap)
    output = running.forward.attend(rows.index, new, scale=scale, valid=read.past)
    running.is_complete = rows.index == running.last
    return output.transpose(1, 2).contiguous()


_outside_graphs: Any = torch.compiler.disable(_folded)


def _captured(
    module: torch.nn.Module,
    query: Tensor,
    rows: CapturedRows,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attend in one folding layer of a step that is being captured."""
    _refuse(module, rows.cache, attention_mask, dropout, kwargs)
    scale = _scale_of(query, scaling, softcap)
    output = rows.step.attend(rows, query, scale=scale, sink_logits=s_aux)
    return output.transpose(1, 2).contiguous()


def _batched(
    before: str, module: torch.nn.Module, query: Tensor, rows: BatchedRows, attention_mask: Any, kwargs: dict[str, Any]
) -> Tensor:
    """Attend with one new token of each row of a batch, row by row."""
    if isinstance(attention_mask, FoldedMask) and attention_mask.columns is not None:
        raise CacheError(
            "an attention mask was given with a batch of folded caches; its rows are never padded; give none"
        )
    if rows.stock is None:
        output = _batched_folding(module, query, rows, attention_mask, **kwargs)
    else:
        attend = _stock(before, module)
        one_row = {name: value for name, value in kwargs.items() if name != "position_ids"}  # rotated already
        answers = [
            attend(module, query[row : row + 1], keys, values, None, **one_row)[0]
            for row, (keys, values) in enumerate(rows.stock)
        ]
        output = torch.cat(answers)
    rows.cache.end_layer(rows.index)
    return output


def _batched_folding(
    module: torch.nn.Module,
    query: Tensor,
    batch: BatchedRows,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attend in one folding layer of every row."""
    caches, index = batch.cache.rows, batch.index
    _refuse(module, caches[0], attention_mask, dropout, kwargs)
    given = kwargs.get("position_ids")
    if caches[0].running.columns is None:
        _read_positions(batch, given, query)
    reader = next((cache.lease for cache in caches if cache.lease.records_hidden_states), None)
    states = None if reader is None else reader.take_hidden_states(index)
    scale = _scale_of(query, scaling, softcap)
    outputs = []
    for row, cache in enumerate(caches):
        one = slice(row, row + 1)
        columns = cache.running.columns
        assert columns is not None, "positions are read before the first row attends"
        new = NewTokens(
            queries=query[one],
            keys=batch.keys[one],
            values=batch.values[one],
            positions=columns.positions,
            valid=None,
            hidden_states=None if states is None else states[one],
            sink_logits=s_aux,
        )
        outputs.append(cache.running.forward.attend(index, new, scale=scale))
    return torch.cat(outputs).transpose(1, 2).contiguous()


def _read_positions(batch: BatchedRows, given: Tensor | None, query: Tensor) -> None:
    """Read the positions of a batch's new tokens for all layers; each must be where its row's text ends."""
    wanted = batch.cache.positions
    if given is not None and given.tolist() != wanted.tolist():
        raise CacheError(
            f"tokens at positions {given.flatten().tolist()} were fed to a batch of folded caches; the texts of its "
            f"rows end at {wanted.flatten().tolist()}; give position_ids=batch.positions"
        )
    wanted = wanted.to(query.device)
    for row, cache in enumerate(batch.cache.rows):
        one = slice(row, row + 1)
        cache.running.columns = _new_columns(cache, None, wanted[one], query[one])


def _scale_of(query: Tensor, scaling: float | None, softcap: float | None) -> float:
    """The factor of the scores as the model gives it, with its cap."""
    return with_cap(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)


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
        ahead = next(iter(cache.memory.layers.values())).state.next_positions
        seen = torch.tensor(ahead or (0,) * rows, device=query.device)
        real = torch.ones(rows, count, dtype=torch.long, device=query.device) if valid is None else valid.long()
        positions = seen[:, None] + (real.cumsum(dim=1) - 1).clamp(min=0)
    limit = cache.lease.position_limit
    if limit is not None and cache.memory.fed + count > limit:
        refuse_position(cache, int(positions.max()))
    return positions


def refuse_position(cache: FoldedCache, position: int) -> None:
    """Raise ModelError for a position that the model of a cache does not have."""
    limit = cache.lease.position_limit
    if limit is not None and position >= limit:
        raise ModelError(
            f"a token was fed at position {position}; {cache.lease.name} has {limit} positions; "
            f"start a new conversation or shorten the text: {why_positions_end(cache.positions)}"
        )


def _refuse(module: torch.nn.Module, cache: FoldedCache, given: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Everything that this attention would get wrong is an error."""
    lease = cache.lease
    if module not in lease.modules and not lease.has_module(module):  # a call less, in every layer of every step
        raise CacheError(
            f"a cache of {cache.lease.name} was used with another model; what it holds means nothing there; "
            "make a new one by kvfold.cache(model, ...)"
        )
    if isinstance(given, Tensor) or (isinstance(given, FoldedMask) and not given.is_causal):
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
