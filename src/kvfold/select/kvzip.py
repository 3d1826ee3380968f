"""KVzip: keep what the model looks at while it repeats the text.

Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, https://arxiv.org/abs/2505.23416
Ours differs: the segment is repeated without a sentence that asks for it, so that no tokenizer is needed; heads of a
layer keep equally many slots (the paper shares its budget out over all heads); each segment is scored once, when it is
folded, from what is held then, and the newest token stays.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from kvfold.cache.kv import KV, Needs, Observed
from kvfold.select.base import Select, best, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class KVzip(Select):
    """The slots with the most attention from any token of the repetition. Costs about a second prefill."""

    scope: Literal["history", "turn"] = "turn"  # a segment is repeated once

    once: ClassVar[bool] = True
    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2505.23416"

    @property
    def needs(self) -> Needs:
        """The most attention that each slot gets while its segment is repeated."""
        return Needs(repetition=True)

    def choose(self, kv: KV, slots: int, observed: Observed) -> Bool[Tensor, "B H S"]:
        """The newest slot, then those that the repetition looked at most."""
        assert observed.mass is not None, "a segment is repeated before it is judged"
        scores = observed.mass
        if observed.together:
            scores = scores.mean(dim=1, keepdim=True).expand_as(scores)
        recent = newest(kv, 1)
        return recent | best(scores, slots - 1, among=~recent)
