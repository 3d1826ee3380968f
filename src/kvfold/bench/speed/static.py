"""StaticStep: one decode step of transformers' static cache, captured as a graph: what captured plans are timed beside.

The cache is as long as its longest text and is read whole, under a mask. It is filled with random keys and values, and
when its room is full it goes back to where it began: time does not depend on what it holds.
"""

from typing import Any

import torch

from kvfold.bench.speed.models import PreTrainedModel, random_rows
from kvfold.hf.argument import given
from kvfold.hf.generation import static_cache
from kvfold.hf.graphs import Capture, Graph

_ROOM = 256  # tokens, as many as a captured step of ours has room for


class StaticStep:
    """A step of one row. It changes with every token."""

    def __init__(self, model: PreTrainedModel, tokens: int, *, seed: int, capture: Capture) -> None:
        self._model, self._tokens = model, tokens
        self._cache = static_cache(model, tokens + _ROOM)
        for index, (keys, values) in enumerate(random_rows(model, tokens, seed=seed)):
            self._cache.update(keys, values, index)
        self._ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._left = 0  # replays until the room is full
        self._capture = capture
        self._graph: Graph | None = None

    def step(self, number: int) -> None:
        """Feed one token, captured when the first one comes."""
        if self._graph is None:
            self._graph = self._capture(self._forward)
        if self._left == 0:
            self._rewind()
        self._ids.fill_(number % self._model.config.vocab_size)
        self._graph.replay()
        self._left -= 1

    def _forward(self) -> Any:
        """What is captured. Each run counts the token in the cache, on the device."""
        with torch.no_grad():
            return self._model(self._ids, **given(self._model, self._cache)).logits

    def _rewind(self) -> None:
        """Go back to the text that it was filled with."""
        layers: Any = self._cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(self._tokens)
        self._left = _ROOM
