"""AttentionStep: new queries that are about to attend over a part, and what a part may ask before they do.

A part that reads everything looks at the queries only. A part that selects pages asks for recent queries, for the
text, and for what other layers hold, so that layers can choose together. It holds no slots and knows no part.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.memory.recent_queries import QueryWindow
from kvfold.memory.tail import PAD
from kvfold.memory.transcript import Transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardScope:
    """The text of one running forward, and values that its layers share."""

    transcript: Transcript = field(default_factory=Transcript)
    folded_parts: Callable[[], list[tuple[Any, QueryWindow | None]]] = list  # of every layer: part, recent queries
    shared: dict[str, Any] = field(default_factory=dict)  # by name: values that a layer worked out for later layers
    is_text: bool | None = None  # tokens of a text that is read, not said one by one; None: where there are several
    trail: Any = None  # a Trail (memory/trail.py) where the newest tokens may be taken back


def _nobody() -> QueryWindow | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionStep:
    """Queries of one forward, or some of them, about to attend over one part of one layer."""

    queries: Float[Tensor, "B G Q D"]
    scale: float
    positions: Int[Tensor, "#B Q"] | None = None
    valid: Bool[Tensor, "B Q"] | None = None  # None: no pads
    # Gives earlier queries, where somebody records them. Asked for seldom: single tokens wait for their record.
    recent: Callable[[], QueryWindow | None] = _nobody
    forward: ForwardScope | None = None  # None: a pass that reads what is selected and selects nothing anew

    def piece(self, start: int, stop: int) -> "AttentionStep":
        """Cut out the queries `start` to `stop`; those before them count as recent ones."""
        span = slice(start, stop)
        recent = self.recent
        if start and self.positions is not None:
            recent = partial(self._recent_before, start, self.positions)
        return replace(
            self,
            queries=self.queries[:, :, span],
            positions=None if self.positions is None else self.positions[:, span],
            valid=None if self.valid is None else self.valid[:, span],
            recent=recent,
        )

    def _recent_before(self, start: int, positions: Int[Tensor, "#B Q"]) -> QueryWindow:
        """Give the earlier queries, and those of this step before `start`."""
        before = slice(0, start)
        # A fold may have dropped the record: the queries before this piece are then the only recent ones.
        recent = self.recent() or QueryWindow.empty(self.queries)
        return recent.followed_by(
            self.queries[:, :, before],
            positions=positions[:, before],
            valid=None if self.valid is None else self.valid[:, before],
        )

    def mean_query(self, heads: int) -> Float[Tensor, "N D"]:
        """Average the queries of each row and key/value head."""
        return self.queries.unflatten(1, (heads, -1)).float().mean(dim=(2, 3)).flatten(0, 1)  # over group and tokens

    def newest(
        self,
        count: int,
        heads: int,
    ) -> tuple[Float[Tensor, "N K D"], Bool[Tensor, "N K"] | None]:
        """Group the last `count` recent queries and the first new one by KV head; which are valid (None: all)."""
        queries = self.queries[:, :, :1]  # B G 1 D
        group = queries.shape[1] // heads
        real = None if self.valid is None else self.valid[:, :1]
        recent = self.recent()
        if recent is not None:
            queries = torch.cat([recent.queries[:, :, -count:], queries], dim=2)  # B G K D
            there = recent.positions[:, -count:] != PAD  # B, K - 1
            now = there.new_ones(there.shape[0], 1) if real is None else real  # B 1
            real = torch.cat([there, now], dim=1)  # B K
        if real is not None:
            # B K -> B H group K -> N, group x K: the mask follows the queries, head of the group by head.
            real = real[:, None, None].expand(-1, heads, group, -1).flatten(2).flatten(0, 1)
        # B G K D -> B H group K D -> N, group x K, D.
        return queries.unflatten(1, (heads, group)).flatten(2, 3).flatten(0, 1), real

    @property
    def is_text(self) -> bool:
        """Whether the tokens belong to a text that is read, however many of it one forward carries."""
        if self.forward is None or self.forward.is_text is None:
            return self.queries.shape[2] > 1
        return self.forward.is_text

    @property
    def sentence_ended(self) -> Bool[Tensor, " B"] | None:
        """Tell of each row whether a sentence ended just before the first new token; None: not known."""
        if self.forward is None or self.positions is None:
            return None
        rows = self.queries.shape[0]
        return self.forward.transcript.sentence_ended(self.positions[:, 0].expand(rows))
