"""Passes: rows or text go through the model and read what every layer remembers; nothing is fed.

Layer by layer the rows attend over the sinks, the folded slots, the columns of the raw tail that they may see, and the
rows before them; in sliding layers over the window as it stands, and the rows before them. Their keys and values in
the folding layers are the answer. Sliding layers and all counters stay as they were.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, partial, softmax_sinks
from kvfold.attention.scores import max_attention_scores
from kvfold.errors import CacheError
from kvfold.hf.argument import given
from kvfold.hf.decoder import decoder_of
from kvfold.hf.rotary import rotations_kept
from kvfold.memory.context import NO_ROW, ReplayText, RowAdapter, Rows
from kvfold.memory.state import LayerState
from kvfold.memory.step import AttentionStep
from kvfold.memory.tail import Tail

States = Mapping[int, LayerState]  # of the folding layers, by their index in the model
Made = tuple[Tensor, Tensor]  # keys and values [B, H, K, D] of the rows in one layer

_PIECE = 256  # tokens replayed at a time


class ModelPasses:
    """The model, as folds of one cache may use it. It refers to the cache weakly: a deleted one is freed at once."""

    def __init__(self, cache: Any, adapter: RowAdapter | None) -> None:
        """`cache` is a FoldedCache, with the lease of a model and the plan that folds."""
        self.adapter = adapter
        self._cache = weakref.ref(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelPasses":
        cache = self._past
        return ModelPasses(memo.get(id(cache), cache), self.adapter)  # a copy is in `memo` before what it holds

    def run(self, states: States, rows: Rows) -> dict[int, Made]:
        """Run rows over what the layers hold; give their keys and values by layer."""
        with _recurrent_states_kept(self._past), rotations_kept(self._model):
            return run(self._model, self._past, states, rows, self.adapter)

    def replay(self, states: States, text: ReplayText) -> dict[int, Tensor]:
        """Run text over what the layers hold; give the maximum attention to each column of the tail by layer."""
        with _recurrent_states_kept(self._past), rotations_kept(self._model):
            return replay(self._model, self._past, states, text)

    @property
    def _past(self) -> Any:
        cache = self._cache()
        assert cache is not None, "a memory folds while its cache is there"
        return cache

    @property
    def _model(self) -> PreTrainedModel:
        past = self._past
        binding = past.lease.binding
        if binding is None:
            raise CacheError(
                f"{past.plan} was to fold; it runs rows through {past.lease.name}, which is gone; keep the model alive"
            )
        return binding.model


@contextlib.contextmanager
def _recurrent_states_kept(past: Any) -> Iterator[None]:
    """Inside, recurrent layers go on from where the text ends that is folded; afterwards they are as they were."""
    if not past.stock.has_recurrent:
        yield
        return
    now = past.stock.states()
    past.stock.put_back(past.running.stock_before)
    try:
        yield
    finally:
        past.stock.put_back(now)


def run(model: PreTrainedModel, past: Cache, states: States, rows: Rows, adapter: RowAdapter | None) -> dict[int, Made]:
    """Run rows through the model's decoder; give their keys and values in every folding layer.

    The adapter acts on rows that look ahead; other rows of text are the model's business alone.
    """
    assert rows.ids is not None, "rows are tokens"
    learned = adapter if rows.ahead is not None else None
    reader = _Reader(past, states, rows, learned)
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as active:
        embedded = model.get_input_embeddings()(rows.ids)
        if learned is not None:
            embedded = embedded + learned.embed(rows.rows).to(embedded.dtype)
            active.enter_context(learned.active())
        decoder: Any = decoder_of(model)
        decoder(inputs_embeds=embedded, position_ids=rows.positions.long(), use_cache=True, **given(decoder, reader))
    return reader.made


def replay(model: PreTrainedModel, past: Cache, states: States, text: ReplayText) -> dict[int, Tensor]:
    """Run text once more; give the maximum attention [B, H, columns] to each column of every folding layer's tail."""
    found: dict[int, Tensor] = {}
    decoder: Any = decoder_of(model)
    order = (~text.real).to(torch.int8).argsort(dim=1, stable=True)  # a row's tokens first
    ids, real = text.ids.gather(1, order), text.real.gather(1, order)
    for start in range(0, int(real.sum(dim=1).max()), _PIECE):
        some = slice(start, start + _PIECE)
        reader = _Listener(past, states, real[:, some], found)
        at = text.first_position[:, None] + torch.arange(start, start + ids[:, some].shape[1], device=ids.device)
        decoder(input_ids=ids[:, some], position_ids=at, use_cache=True, **given(decoder, reader))
    return found


@dataclass(frozen=True, slots=True)
class PassRows:
    """Keys and values of the rows in one layer, on their way to kvfold's attention function."""

    reader: "_Reader"
    index: int
    keys: Float[Tensor, "B H K D"]
    values: Float[Tensor, "B H K E"]

    def attend(
        self, queries: Float[Tensor, "B G K D"], *, scale: float, sink_logits: Float[Tensor, " G"] | None = None
    ) -> Float[Tensor, "B G K D"]:
        """Attend with the rows in one layer."""
        answers = self.reader.past_of(self.index, queries, scale)
        if self.reader.learned is None:
            mask = self.reader.row_mask
            answers.append(partial(queries, self.keys, self.values, scale=scale, causal=True, mask=mask))
        if sink_logits is not None:
            answers.append(softmax_sinks(queries, sink_logits))
        whole = merge(answers)
        if self.reader.learned is not None:
            return self.reader.with_later(self.index, queries, scale, whole)
        self.reader.note(self.index, queries, whole.log_sum_exp, scale)
        return whole.output


class _Reader(Cache):
    """A cache that is read and never written: the model's past, for one pass."""

    def __init__(self, past: Cache, states: States, rows: Rows, learned: RowAdapter | None = None) -> None:
        """`learned` is the adapter of rows that look ahead."""
        super().__init__(layers=list(past.layers))
        self.past, self.states, self.rows, self.learned = past, states, rows, learned
        self.row_mask = rows.real[:, None, None]  # B 1 1 K
        self.made: dict[int, Made] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keep the rows of a folding layer as the answer; store nothing."""
        if layer_idx in self.states:
            self.made[layer_idx] = (key_states, value_states)
        rows = PassRows(self, layer_idx, key_states, value_states)
        return rows, rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the columns fed so far: a pass adds none."""
        return self.past.get_query_offset(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Count the same columns."""
        return self.past.get_query_offset(layer_idx)

    def note(self, index: int, queries: Tensor, log_sum_exp: Tensor, scale: float) -> None:
        """Note what a layer's rows attended to; a pass of rows does not."""

    def past_of(self, index: int, queries: Tensor, scale: float) -> list[Partial]:
        """Attend over one layer's past, as far as the rows see it."""
        if index not in self.states:
            layer: Any = self.layers[index]
            if layer.keys is None:
                return []
            window = slice(1 - layer.sliding_window, None)  # one that records its past for a while holds more
            return [partial(queries, layer.keys[:, :, window], layer.values[:, :, window], scale=scale)]
        state = self.states[index]
        step = AttentionStep(queries=queries, scale=scale)
        parts = [part for part in (state.sinks, state.folded) if part is not None and part.slots]
        answers = [part.attend(step)[0] for part in parts]
        tail = state.tail
        assert tail is not None
        return [*answers, self._of_tail(tail, queries, scale, self.rows.first, self.rows.stop)]

    def with_later(self, index: int, queries: Tensor, scale: float, whole: Partial) -> Float[Tensor, "B G K D"]:
        """Let rows that look ahead see the rest of their segment too, as far as the gates of a layer open."""
        assert self.learned is not None, "rows that look ahead have an adapter"
        assert self.rows.ahead is not None, "rows that look ahead say how far"
        if index not in self.states:
            return whole.output
        tail = self.states[index].tail
        assert tail is not None
        end = torch.full_like(self.rows.stop, self.rows.ahead)
        later = self._of_tail(tail, queries, scale, self.rows.stop, end)
        both = merge([whole, later]).output
        gate = self.learned.gate(index)[:, None, None]  # G 1 1
        return whole.output + gate.to(both.dtype) * (both - whole.output)

    def _of_tail(
        self, tail: Tail, queries: Tensor, scale: float, first: Int[Tensor, "B K"], stop: Int[Tensor, "B K"]
    ) -> Partial:
        """Attend over the columns of a tail from `first` up to `stop`."""
        columns = torch.arange(tail.length, device=tail.keys.device)
        inside = (columns >= first[..., None]) & (columns < stop[..., None])  # B K S
        seen = (inside & tail.valid[:, None])[:, None]  # B 1 K S
        keys, values = tail.keys[:, :, : tail.length], tail.values[:, :, : tail.length]
        return partial(queries, keys, values, scale=scale, mask=seen)


class _Listener(_Reader):
    """A reader whose rows see the whole tail, and which notes how much they attend to it.

    Each piece sees itself only beside what is held: what was replayed before is no part of the memory.
    """

    def __init__(self, past: Cache, states: States, real: Bool[Tensor, "B K"], found: dict[int, Tensor]) -> None:
        tail = next(iter(states.values())).tail
        assert tail is not None
        first = torch.zeros_like(real, dtype=torch.long)
        rows = torch.where(real, 0, NO_ROW)
        super().__init__(past, states, Rows(rows=rows, positions=first, first=first, stop=first + tail.length))
        self.found = found

    def note(self, index: int, queries: Tensor, log_sum_exp: Tensor, scale: float) -> None:
        """Take the maximum weights of these queries over the columns of a layer's tail."""
        if index not in self.states:
            return
        tail = self.states[index].tail
        assert tail is not None
        keys, real = tail.keys[:, :, : tail.length], self.rows.real[:, :, None]
        most = max_attention_scores(queries, keys, log_sum_exp, scale=scale, seen=real).masked_fill(
            ~tail.valid[:, None], 0.0
        )
        before = self.found.get(index)
        self.found[index] = most if before is None else torch.maximum(before, most)
