"""Runs a Pass: rows of a method's own go through the model and read what every layer remembers; nothing is fed.

Layer by layer the rows attend over the sinks, the folded slots, the columns of the raw tail that they may see, and
the rows before them; in sliding layers over the window as it stands, and the rows before them. Their keys and values
in the folding layers are the answer. Sliding layers and all counters stay as they were.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, partial
from kvfold.cache.absorb import Made
from kvfold.cache.cache import Memory
from kvfold.cache.fold import State
from kvfold.cache.request import Pass
from kvfold.hf.adapters import Adapter


def run(model: PreTrainedModel, past: Cache, memory: Memory, request: Pass, adapter: Adapter) -> dict[int, Made]:
    """Keys and values of the rows in every folding layer, after one forward of the model's decoder."""
    reader = _Reader(past, memory, request)
    embedded = adapter.embed(request.rows).to(model.dtype)
    with torch.inference_mode(False), torch.no_grad(), adapter.active():
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
        return merge([*self.reader.past_of(self.index, queries, scale), own]).output


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
