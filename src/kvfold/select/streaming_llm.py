"""StreamingLLM: keep the first tokens and the newest ones.

Xiao et al., Efficient Streaming Language Models with Attention Sinks, https://arxiv.org/abs/2309.17453
Ours differs: keys keep the rotation of their original position, and the sinks are kept by the layer for every method.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from kvfold.memory.kv import KV, Observed
from kvfold.select.base import Select, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(Select):
    """The sinks and the newest tokens."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2309.17453"

    def choose(self, kv: KV, slots: int, observed: Observed) -> Bool[Tensor, "B H S"]:
        """The newest slots."""
        return newest(kv, slots)
