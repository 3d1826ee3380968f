"""SnapKV: keep what the newest queries look at, and the newest tokens themselves.

Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, https://arxiv.org/abs/2404.14469
Ours differs: scores are the true attention weights (from the layer's log-sum-exp), averaged over the query group so
that one choice serves a key/value head; it may choose again at the end of a turn and while decoding; where the
budget or the text is shorter than two windows, the window of kept tokens shrinks to half of the budget.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from kvfold.attention.soft_cap import capped
from kvfold.errors import PlanError
from kvfold.memory.candidates import Candidates
from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.recorders import Recorder
from kvfold.select.base import PerLayerSelect, Select, best, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(PerLayerSelect):
    """The slots that the last `window` queries attend to, smoothed over `pool` neighbours, and the last tokens."""

    window: int = 32  # newest queries whose attention is the score; as many of the newest tokens stay
    pool: int = 7  # neighbours over which scores are averaged; odd

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
    def records(self) -> tuple[Recorder, ...]:
        """Record the newest queries of each row."""
        return (RecentQueries(self.window),)

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark the newest slots, then those with the highest pooled scores; the newest ones are not pooled over."""
        slots, kv = candidates.slots, candidates.kv
        window = max(min(self.window, slots // 2), 1)
        recent = newest(kv, window)
        if len(kv) <= window:
            return recent
        older = self.scores(candidates)[:, :, :-window]  # the window lifts none of its neighbours
        pooled = avg_pool1d(older, self.pool, stride=1, padding=self.pool // 2, count_include_pad=False)
        scores = pad(pooled, (0, window))
        return recent | best(scores, slots - window, among=~recent, shared_heads=candidates.shared_heads)

    def scores(self, candidates: Candidates) -> Float[Tensor, "B H S"]:
        """Sum the attention that each slot gets from recent queries, each seeing what lies before it."""
        kv, recent = candidates.kv, candidates.recent
        assert recent is not None, "recent queries are recorded"
        heads = kv.keys.shape[1]
        queries = recent.queries.float().unflatten(1, (heads, -1))  # B H group W D
        products = queries @ kv.keys.float()[:, :, None].mT  # B H group W S
        logits = capped(products * candidates.scale, candidates.scale)
        weights = (logits - recent.log_sum_exp.unflatten(1, (heads, -1))[..., None]).exp()
        visible = recent.positions[:, None, :, None] >= kv.positions[:, :, None]  # B H W S
        return torch.where(visible[:, :, None], weights, 0.0).mean(dim=2).sum(dim=2)
