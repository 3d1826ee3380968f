"""ChunkKV: keep what the newest queries of any layer look at, with the text around it, the same in all layers.

Liu et al., ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference,
https://arxiv.org/abs/2502.00299, on the votes of SnapKV, https://arxiv.org/abs/2404.14469
Ours differs: a chunk lies around a vote instead of on a grid, so that no sentence is cut where a grid falls; it is
worth its best vote of any layer, head and query, not a sum; and all layers share one choice, where the paper's share it
with their neighbours. A layer that looks for a name only once the reply is being written has no vote of its own yet.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.attention.scores import POOL, pool_and_dilate
from kvfold.errors import PlanError
from kvfold.memory.context import FoldContext, Selection
from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.recorders import Recorder
from kvfold.select.base import JointSelect


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkKV(JointSelect):
    """The same slots in all layers: those around the best scores by the last `window` queries, and the last tokens."""

    window: int = 32  # newest queries whose attention is the score; as many of the newest tokens stay
    pool: int = POOL  # neighbours over which scores are averaged; odd
    reach: int = 80  # tokens that stay on either side of one that was attended to

    query_aware: ClassVar[bool] = True
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2502.00299"

    def __post_init__(self) -> None:
        JointSelect.__post_init__(self)
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0 or self.reach < 0:
            raise PlanError(
                f"window={self.window}, pool={self.pool}, reach={self.reach} was asked for; a window has a query, a "
                "pool a middle and a chunk its own token; give window=1 or more, an odd pool, and reach=0 or more"
            )

    @property
    def records(self) -> tuple[Recorder, ...]:
        """Record the newest queries of each row, in every layer."""
        return (RecentQueries(self.window),)

    def choose(self, context: FoldContext) -> Selection:
        """Keep the newest slots, then chunk after chunk; a segment that fits stays as it is."""
        segment = context.segment
        kept = segment.nothing_kept()
        scores = None
        for row, slots in enumerate(segment.slots):
            tokens = segment.real[row].nonzero().flatten()
            if slots >= len(tokens):
                kept[row] = segment.real[row]
            elif slots:
                scores = context.query_scores() if scores is None else scores
                of_all = scores[row][..., tokens].flatten(0, 1)  # of every layer and head
                kept[row, ..., tokens[self._best(of_all, slots)]] = True
        return Selection.of_layers(context.layers, kept)

    def _best(self, scores: Float[Tensor, "V S"], slots: int) -> Int[Tensor, " slots"]:
        """Rank a row's tokens by the best score near them, its newest tokens first."""
        score = pool_and_dilate(scores[None], pool=self.pool, reach=self.reach)[0]
        recent = max(min(self.window, slots // 2), 1)
        score[len(score) - recent :] = torch.inf
        return score.sort(descending=True, stable=True).indices[:slots]
