"""Runs a Pass or a Repetition: rows go through the model and read what every layer remembers; nothing is fed.

Layer by layer the rows attend over the sinks, the folded slots, the columns of the raw tail that they may see, and
the rows before them; in sliding layers over the window as it stands, and the rows before them. Their keys and values
in the folding layers are the answer. Sliding layers and all counters stay as they were.
"""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, partial
from kvfold.attention.scores import max_attention_scores as attention_peak
from kvfold.memory.absorb import Made
from kvfold.memory.fold import State
from kvfold.memory.memory import Memory
from kvfold.memory.request import NO_ROW, Pass, Repetition


@runtime_checkable
class RowAdapter(Protocol):
    """What a pass needs of an adapter: embeddings of its rows, and updates of the model's layers while they run."""

    @property
    def size_bytes(self) -> int:
        """Bytes of everything that was learned."""
        ...

    def embed(self, rows: Int[Tensor, "B K"]) -> Float[Tensor, "B K width"]:
        """Embeddings of some rows."""
        ...

    def worth(self, keys: Tensor, values: Tensor, positions: Tensor, real: Tensor) -> Tensor:
        """Scores [B, L, H, S] of the slots of a segment, given keys and values [B, S, L, H, D]."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """Inside, the model's linear layers are updated."""
        ...


def run(
    model: PreTrainedModel, past: Cache, memory: Memory, request: Pass, adapter: RowAdapter | None
) -> dict[int, Made]:
    """Keys and values of the rows in every folding layer, after one forward of the model's decoder.

    The adapter acts on rows of its own; rows of text are the model's business alone.
    """
    reader = _Reader(past, memory, request)
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as active:
        if request.ids is not None:
            embedded = model.get_input_embeddings()(request.ids)
        else:
            assert adapter is not None, "a method that runs rows of its own has an adapter"
            embedded = adapter.embed(request.rows).to(model.dtype)
            active.enter_context(adapter.active())
        decoder: Any = model.get_decoder()
        decoder(inputs_embeds=embedded, position_ids=request.positions.long(), past_key_values=reader, use_cache=True)
    return reader.made


@dataclass(frozen=True, slots=True)
class PassRows:
    """Keys and values of the rows in one layer, on their way to kvfold's attention function."""

    reader: "_Reader"
    index: int
    keys: Float[Tensor, "B H K D"]
    values: Float[Tensor, "B H K E"]

    def attend(self, queries: Float[Tensor, "B G K D"], *, scale: float) -> Float[Tensor, "B G K D"]:
        """Output of one layer for the rows."""
        own = partial(queries, self.keys, self.values, scale=scale, causal=True, mask=self.reader.own_mask)
        whole = merge([*self.reader.past_of(self.index, queries, scale), own])
        self.reader.note(self.index, queries, whole.log_sum_exp, scale)
        return whole.output


_PIECE = 256  # tokens repeated at a time


def repeat(model: PreTrainedModel, past: Cache, memory: Memory, request: Repetition) -> dict[int, Tensor]:
    """The most attention [B, H, columns] that any repeated token gives to each column of every folding layer's tail."""
    found: dict[int, Tensor] = {}
    decoder: Any = model.get_decoder()
    order = (~request.real).to(torch.int8).argsort(dim=1, stable=True)  # a row's tokens first
    ids, real = request.ids.gather(1, order), request.real.gather(1, order)
    for start in range(0, int(real.sum(dim=1).max()), _PIECE):
        some = slice(start, start + _PIECE)
        reader = _Listener(past, memory, real[:, some], found)
        at = request.first_position[:, None] + torch.arange(start, start + ids[:, some].shape[1], device=ids.device)
        decoder(input_ids=ids[:, some], position_ids=at, past_key_values=reader, use_cache=True)
    return found


class _Reader(Cache):
    """A cache that is read and never written: the model's past, for one pass."""

    def __init__(self, past: Cache, memory: Memory, request: Pass) -> None:
        super().__init__(layers=list(past.layers))
        self.memory, self.request = memory, request
        self.own_mask = request.real[:, None, None]  # B 1 1 K
        self.made: dict[int, Made] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keep the rows of a folding layer as the answer; store nothing."""
        if layer_idx in self.memory.layers:
            self.made[layer_idx] = (key_states, value_states)
        rows = PassRows(self, layer_idx, key_states, value_states)
        return rows, rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far: a pass adds none."""
        return self.memory.fed

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_seq_length`."""
        return self.memory.fed

    def note(self, index: int, queries: Tensor, log_sum_exp: Tensor, scale: float) -> None:
        """What a layer's rows looked at; a pass does not care."""

    def past_of(self, index: int, queries: Tensor, scale: float) -> list[Partial]:
        """What the rows read of one layer's past."""
        if index not in self.memory.layers:
            layer: Any = self.layers[index]
            return [] if layer.keys is None else [partial(queries, layer.keys, layer.values, scale=scale)]
        state = self.memory.layers[index].state
        parts = [part for part in (state.sinks, state.folded) if part is not None and part.slots]
        answers = [part.attend(queries, scale=scale) for part in parts]
        tail = state.tail
        assert tail is not None
        seen = self._seen_columns(state)
        keys, values = tail.keys[:, :, : tail.length], tail.values[:, :, : tail.length]
        return [*answers, partial(queries, keys, values, scale=scale, mask=seen)]

    def _seen_columns(self, state: State) -> Bool[Tensor, "B 1 K S"]:
        tail = state.tail
        assert tail is not None
        columns = torch.arange(tail.length, device=tail.keys.device)
        inside = (columns >= self.request.first[..., None]) & (columns < self.request.stop[..., None])  # B K S
        return (inside & tail.valid[:, None])[:, None]


class _Listener(_Reader):
    """A reader whose rows see the whole tail, and which notes how much they look at it. Each piece sees itself only
    beside what is held: what was repeated before is no part of the memory."""

    def __init__(self, past: Cache, memory: Memory, real: Bool[Tensor, "B K"], found: dict[int, Tensor]) -> None:
        columns = next(iter(memory.layers.values())).state.tail
        assert columns is not None
        where = torch.zeros_like(real, dtype=torch.long)
        rows = torch.where(real, 0, NO_ROW)
        kept = torch.zeros(len(real), 0, 0, 0, dtype=torch.bool)
        super().__init__(
            past, memory,
            Pass(rows=rows, positions=where, first=where, stop=where + columns.length, kept=kept),
        )  # fmt: skip
        self.found = found

    def note(self, index: int, queries: Tensor, log_sum_exp: Tensor, scale: float) -> None:
        """Take the largest weights of these queries over the columns of a layer's tail."""
        if index not in self.memory.layers:
            return
        tail = self.memory.layers[index].state.tail
        assert tail is not None
        keys, real = tail.keys[:, :, : tail.length], self.request.real[:, :, None]
        most = attention_peak(queries, keys, log_sum_exp, scale=scale, seen=real).masked_fill(~tail.valid[:, None], 0.0)
        before = self.found.get(index)
        self.found[index] = most if before is None else torch.maximum(before, most)
