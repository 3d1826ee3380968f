"""StreamingLLM: keep the first tokens and the newest ones.

Xiao et al., Efficient Streaming Language Models with Attention Sinks, https://arxiv.org/abs/2309.17453
Ours differs: keys keep the rotation of their original position, and the sinks are kept by the layer for every method.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from kvfold.memory.candidates import Candidates
from kvfold.select.base import PerLayerSelect, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(PerLayerSelect):
    """The sinks and the newest tokens."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2309.17453"

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark the newest slots."""
        return newest(candidates.kv, candidates.slots)
