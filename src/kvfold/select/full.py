"""full: keep every token. The ceiling of every table.

Source: the model itself, https://arxiv.org/abs/1706.03762 (attention over everything).
Ours differs: buffers grow by an eighth and grouped queries are packed, so decoding does not copy the cache.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from kvfold.memory.candidates import Candidates
from kvfold.select.base import PerLayerSelect, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(PerLayerSelect):
    """Everything stays."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        self.refuse_budget("full keeps everything")

    @property
    def budget(self) -> None:
        """Give no budget: nothing is ever dropped."""
        return None

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark every slot; a layer without a budget never asks."""
        return newest(candidates.kv, len(candidates.kv))
