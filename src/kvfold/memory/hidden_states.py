"""Hidden states: what enters each attention layer for the tokens that are still raw.

Methods that predict the importance of a token from its hidden state (kvpress passes them to every press) record them.
They cost width numbers a token and layer, so they are kept only where a method names them. A fold drops those of the
columns that leave.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.errors import CacheError
from kvfold.memory.recorders import FoldEvent, Observation, Record, Recorder


@dataclass(frozen=True, slots=True)
class HiddenStates(Recorder):
    """Record the hidden states of raw tokens."""

    name: ClassVar[str] = "hidden_states"

    def open(self, keys: Float[Tensor, "B H Q D"]) -> "HiddenRows":
        """Open a record of no columns; the first ones say how wide they are."""
        return HiddenRows(states=keys.new_empty(keys.shape[0], 0, 0))  # B columns width

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> "HiddenRows":
        """Build the record that was saved."""
        return HiddenRows(**tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenRows(Record):
    """The hidden states of one layer's raw columns."""

    states: Float[Tensor, "B columns width"]

    def observe(self, seen: Observation) -> "HiddenRows":
        """Append the hidden states of new tokens. Raises CacheError where the model does not show them."""
        if seen.hidden_states is None:
            raise CacheError(
                "hidden states were to be recorded; this model's attention layers do not show theirs; "
                "use a method that does without them"
            )
        # The first ones are copied: a record keeps no tensor of the model's.
        new = seen.hidden_states.detach()
        return replace(self, states=torch.cat([self.states, new], dim=1) if self.states.shape[1] else new.clone())

    def fold(self, event: FoldEvent) -> "HiddenRows":
        """Drop the columns that leave the tail."""
        return replace(self, states=self.states[:, event.columns :].clone())  # a view would keep the whole alive

    def crop(self, stops: Sequence[int], columns: int) -> "HiddenRows":
        """Drop the newest columns."""
        return replace(self, states=self.states[:, : self.states.shape[1] - columns].clone())

    def invalidate(self, gone: Int[Tensor, "B columns"]) -> "HiddenRows":
        """Leave the columns of pads as they are: no method reads them."""
        return self

    def take_rows(self, rows: Sequence[int]) -> "HiddenRows":
        """Pick these rows, in this order, repeats allowed."""
        return replace(self, states=self.states[list(rows)])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the states."""
        yield "states", self.states
