"""H2O: keep the newest tokens and the heavy hitters, those that received the most attention so far.

Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference, https://arxiv.org/abs/2306.14048
Ours differs: sums are averaged over the query group, so one choice serves a key/value head, and divided by the
number of queries that could see the slot (the paper's plain sums favour early tokens; normalise=False has them).
They are added up block by block from the log-sum-exp, so the attention matrix is never written out.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from kvfold.errors import PlanError
from kvfold.memory.attention_sums import AttentionSums
from kvfold.memory.candidates import Candidates
from kvfold.memory.recorders import Recorder
from kvfold.select.base import PerLayerSelect, Select, best, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(PerLayerSelect):
    """Half of the budget for the newest tokens, half for heavy hitters."""

    recent: float = 0.5  # share of the slots that goes to the newest tokens
    normalise: bool = True  # by how many queries could see a slot

    query_aware: ClassVar[bool] = True
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2306.14048"

    def __post_init__(self) -> None:
        Select.__post_init__(self)
        if not 0 <= self.recent <= 1:
            raise PlanError(f"recent={self.recent} was asked for; it is a share of the slots; give 0 to 1")

    @property
    def records(self) -> tuple[Recorder, ...]:
        """Record the attention that every slot receives."""
        return (AttentionSums(),)

    @property
    def reads_ages(self) -> bool:
        """Tell whether sums are divided by how long a slot was there."""
        return self.normalise

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark the newest slots, then those with the most attention a query."""
        kv, slots, scores = candidates.kv, candidates.slots, candidates.attention_sums
        assert scores is not None, "attention sums are recorded"
        recent = newest(kv, min(max(round(slots * self.recent), 1), slots))
        if self.normalise:
            # The sum of a slot has as many terms as there were queries at or after it.
            scores = scores / (candidates.seen[:, None, None] - kv.positions).clamp(min=1)
        rest = slots - int(recent[0, 0].sum())
        return recent | best(scores, rest, among=~recent, shared_heads=candidates.shared_heads)
