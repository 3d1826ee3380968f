"""Novelty: keep the tokens whose hidden states lie farthest from the mean of their segment.

An example of a method that reads hidden states: this file is all that it takes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.memory.candidates import Candidates
from kvfold.memory.hidden_states import HiddenStates
from kvfold.memory.recorders import Recorder
from kvfold.select.base import PerLayerSelect, best, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Novelty(PerLayerSelect):
    """The newest token, then the most novel ones; of slots that were chosen before, the newest."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    @property
    def records(self) -> tuple[Recorder, ...]:
        """Record what enters each attention layer."""
        return (HiddenStates(),)

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark the most novel tokens, the same for every head."""
        kv, states = candidates.kv, candidates.hidden_states
        assert states is not None, "hidden states are recorded"
        novelty = (states.float() - states.float().mean(dim=1, keepdim=True)).norm(dim=2)
        # Slots of earlier segments have no hidden states any more: they rank among new ones by their age.
        age = candidates.seen[:, None] - kv.positions[:, 0, : len(kv) - novelty.shape[1]]
        scores = torch.cat([novelty.mean(dim=1, keepdim=True) / age, novelty], dim=1) if age.shape[1] else novelty
        recent = newest(kv, 1)
        return recent | best(scores[:, None].expand(kv.positions.shape), candidates.slots - 1, among=~recent)
