"""First: keep the first tokens of each segment. A control: learning must beat it.

The lead baseline of summarising: See et al., Get To The Point, https://arxiv.org/abs/1704.04368
Ours differs: it keeps slots, not text. Its mirror image, the last tokens of a segment, is streaming_llm(scope="turn").
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.memory.candidates import Candidates
from kvfold.select.base import PerLayerSelect


@dataclass(frozen=True, slots=True, kw_only=True)
class First(PerLayerSelect):
    """The first tokens of each segment, and its newest one."""

    scope: Literal["history", "turn"] = "turn"

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = "https://arxiv.org/abs/1704.04368"

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark the oldest slots; the newest token stays, as in every method."""
        positions = candidates.kv.positions
        kept = torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
        kept[:, :, : candidates.slots - 1] = True
        kept[:, :, -1] = True
        return kept
