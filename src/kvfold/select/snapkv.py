"""SnapKV: keep what the newest queries look at, and the newest tokens themselves.

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, https://arxiv.org/abs/2404.14469
Ours differs: votes are the true attention weights (from the layer's log-sum-exp), averaged over the query group so
that one choice serves a key/value head; it may choose again at the end of a turn and while decoding; where the
budget or the text is shorter than two windows, the window of kept tokens shrinks to half of the budget.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvfold.errors import PlanError
from kvfold.memory.kv import KV, Needs, Observed
from kvfold.select.base import Select, best, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(Select):
    """The slots that the last `window` queries vote for, smoothed over `pool` neighbours, and the last tokens."""

    window: int = 32
    pool: int = 7  # odd

    query_aware: ClassVar[bool] = True
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2404.14469"

    def __post_init__(self) -> None:
        Select.__post_init__(self)
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise PlanError(
                f"window={self.window}, pool={self.pool} was asked for; a window has at least one query and a pool "
                "has a middle; give window=1 or more and an odd pool"
            )

    @property
    def needs(self) -> Needs:
        """The newest queries of each row."""
        return Needs(queries=self.window)

    def choose(self, kv: KV, slots: int, observed: Observed) -> Bool[Tensor, "B H S"]:
        """The newest slots, then those with the most votes."""
        recent = newest(kv, max(min(self.window, slots // 2), 1))
        votes = self.votes(kv, observed)
        smooth = avg_pool1d(votes, self.pool, stride=1, padding=self.pool // 2, count_include_pad=False)
        return recent | best(smooth, slots - int(recent[0, 0].sum()), among=~recent, together=observed.together)

    def votes(self, kv: KV, observed: Observed) -> Float[Tensor, "B H S"]:
        """Attention that each slot gets from the window's queries, each seeing what lies before it."""
        assert observed.queries is not None
        assert observed.log_sum_exp is not None
        assert observed.query_positions is not None, "the layer keeps the window of queries when it is needed"
        heads = kv.keys.shape[1]
        queries = observed.queries.float().unflatten(1, (heads, -1))  # B H group W D
        scores = queries @ kv.keys.float()[:, :, None].mT * observed.scale  # B H group W S
        weights = (scores - observed.log_sum_exp.unflatten(1, (heads, -1))[..., None]).exp()
        visible = observed.query_positions[:, None, :, None] >= kv.positions[:, :, None]  # B H W S
        return torch.where(visible[:, :, None], weights, 0.0).mean(dim=2).sum(dim=2)
