"""Page selection: which slots of a layer are selected now, since when, and for which query.

A value, like the part that it belongs to. Layers choose together once after a forward of several tokens: the recent
queries of every layer score the slots, and the pages with the best score of any layer are pinned in every layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.memory.step import AttentionStep

_KEY = "query_scores"  # among what the layers of a forward share


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSelection:
    """The selected slots of one layer, when each row selected them, and for which query."""

    slots: Int[Tensor, "N budget"] | None = None  # None: everything is read
    since: tuple[int, ...] = ()  # of each row, tokens since it selected
    mean_query: Float[Tensor, "N D"] | None = None  # of the last selection
    pinned: Bool[Tensor, "N M"] | None = None  # pages that stay selected until the next forward of several tokens

    @classmethod
    def from_saved(
        cls,
        since: Sequence[int],
        tensors: Mapping[str, Tensor],
    ) -> "PageSelection":
        """Build a selection that was saved, by the names that files use."""
        return cls(
            slots=tensors.get("selected"),
            since=tuple(since),
            mean_query=tensors.get("before"),
            pinned=tensors.get("firm"),
        )

    def saved(self) -> dict[str, Tensor]:
        """Give every tensor held, by the names that files use."""
        named = {"selected": self.slots, "before": self.mean_query, "firm": self.pinned}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def of_everything(self) -> "PageSelection":
        """Select nothing: everything is read."""
        return PageSelection(since=self.since)

    def take_rows(self, rows: Sequence[int], heads: Int[Tensor, " N"]) -> "PageSelection":
        """Pick these rows, in this order, repeats allowed. `heads` are the numbers of their heads among the N."""
        return PageSelection(
            slots=None if self.slots is None else self.slots[heads],
            since=tuple(self.since[row] for row in rows),
            mean_query=None if self.mean_query is None else self.mean_query[heads],
            pinned=None if self.pinned is None else self.pinned[heads],
        )

    def mixed(
        self,
        fresh: "PageSelection",
        rows: Sequence[bool],
        heads: int,
    ) -> "PageSelection":
        """Take the fresh selection for the rows that are True and this one for the others."""
        if all(rows):
            return fresh
        assert self.slots is not None
        assert self.mean_query is not None
        assert fresh.slots is not None
        assert fresh.mean_query is not None
        # B -> N 1: a row's heads select together.
        new = torch.tensor(list(rows), device=fresh.slots.device).repeat_interleave(heads)[:, None]
        return PageSelection(
            slots=torch.where(new, fresh.slots, self.slots),
            since=tuple(
                after if now else before
                for now, before, after in zip(
                    rows,
                    self.since,
                    fresh.since,
                    strict=True,
                )
            ),
            mean_query=torch.where(new, fresh.mean_query, self.mean_query),
            pinned=fresh.pinned,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by name."""
        named = {"selected": self.slots, "mean_query": self.mean_query, "pinned": self.pinned}
        yield from ((name, tensor) for name, tensor in named.items() if tensor is not None)


def joint_query_scores(step: AttentionStep) -> Float[Tensor, "B S"] | None:
    """Score the slots by the maximum over all layers, once a forward; None where a layer has no scores to give."""
    assert step.forward is not None, "pages are selected in a forward"
    shared = step.forward.shared
    if _KEY not in shared:
        # The first layer that asks works it out for all layers of the forward.
        shared[_KEY] = _over_layers(step.forward.folded_parts(), step.scale)
    return shared[_KEY]


def _over_layers(
    parts: Sequence[tuple[Any, Any]],
    scale: float,
) -> Float[Tensor, "B S"] | None:
    scores = []
    for part, recent in parts:
        found = part.query_scores(recent, scale)
        if found is None or (scores and found.shape != scores[0].shape):  # layers that hold other slots
            return None
        scores.append(found)
    return torch.stack(scores).amax(dim=0) if scores else None  # layers B S -> B S
