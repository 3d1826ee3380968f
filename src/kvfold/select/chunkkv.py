"""ChunkKV: what any layer's newest queries look at stays in every layer, with the words around it.

Liu et al., ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference,
https://arxiv.org/abs/2502.00299, on the votes of SnapKV, https://arxiv.org/abs/2404.14469
Ours differs: a chunk lies around a vote instead of on a grid, so that no sentence is cut where a grid falls; it is
worth its best vote of any layer, head and query, not a sum; and all layers share one choice, where the paper's share it
with their neighbours. A layer that looks for a name only once the reply is being written has no vote of its own yet.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.errors import PlanError
from kvfold.memory.kv import Needs
from kvfold.memory.request import Pass, Segment
from kvfold.memory.votes import POOL, stretched
from kvfold.select.base import ByPass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkKV(ByPass):
    """The same slots in all layers: those around the best votes of the last `window` queries, and the last tokens."""

    window: int = 32
    pool: int = POOL  # neighbours over which a vote is averaged; odd
    reach: int = 80  # tokens that stay on either side of one that was voted for

    query_aware: ClassVar[bool] = True
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2502.00299"

    def __post_init__(self) -> None:
        ByPass.__post_init__(self)
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0 or self.reach < 0:
            raise PlanError(
                f"window={self.window}, pool={self.pool}, reach={self.reach} was asked for; a window has a query, a "
                "pool a middle and a chunk its own token; give window=1 or more, an odd pool, and reach=0 or more"
            )

    @property
    def needs(self) -> Needs:
        """The newest queries of each row, in every layer."""
        return Needs(queries=self.window)

    def request(self, segment: Segment) -> Pass:
        """The newest slots, then chunk after chunk; a segment that fits stays as it is."""
        kept = segment.nothing_kept()
        for row, slots in enumerate(segment.slots):
            tokens = segment.real[row].nonzero().flatten()
            if slots >= len(tokens):
                kept[row] = segment.real[row]
            elif slots:
                assert segment.worth is not None, "a method that needs queries is given what they look at"
                votes = segment.worth[row][..., tokens].flatten(0, 1)  # of every layer and head
                score = stretched(votes[None], pool=self.pool, reach=self.reach)[0]
                score[len(tokens) - max(min(self.window, slots // 2), 1) :] = torch.inf
                kept[row, ..., tokens[score.sort(descending=True, stable=True).indices[:slots]]] = True
        return Pass.of(segment, kept)
