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
from kvfold.memory.kv import KV, Needs, Observed
from kvfold.select.base import Select, best, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(Select):
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
    def needs(self) -> Needs:
        """The attention that every slot received."""
        return Needs(mass=True)

    def choose(self, kv: KV, slots: int, observed: Observed) -> Bool[Tensor, "B H S"]:
        """The newest slots, then those with the most attention a query."""
        assert observed.mass is not None, "the layer counts attention when it is needed"
        recent = newest(kv, min(max(round(slots * self.recent), 1), slots))
        scores = observed.mass
        if self.normalise:
            scores = scores / (observed.seen[:, None, None] - kv.positions).clamp(min=1)
        return recent | best(scores, slots - int(recent[0, 0].sum()), among=~recent, together=observed.together)
