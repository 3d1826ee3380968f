"""PageTable: the offloaded slots of one layer, their index, and the selection of pages that new queries attend to.

A value over a store that changes. Rows and heads are one dimension of N entries here. It scores pages by the policy,
fills each head's budget with the best ones, and is extended by folds. It does not attend. Layers choose together once
after a forward of several tokens: the recent queries of every layer score the slots, and the pages with the best score
of any layer are pinned in every layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.scores import POOL, max_attention_scores, pool_and_dilate
from kvfold.memory import ragged
from kvfold.memory.pages import Pages
from kvfold.memory.part import Part
from kvfold.memory.ragged import Counts
from kvfold.memory.recent_queries import QueryWindow
from kvfold.memory.step import AttentionStep
from kvfold.memory.transcript import Transcript
from kvfold.place.page_choice import best_pages, fill_budget
from kvfold.place.page_index import PageIndex
from kvfold.place.policy import PagePolicy

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

    def is_of(self, counts: Counts) -> bool:
        """Tell whether it selects among so many slots of each row and head."""
        if self.slots is None or self.slots.numel() == 0:
            return len(self.since) == len(counts)
        first, last = self.slots.aminmax()
        return len(self.since) == len(counts) and int(first) >= -1 and int(last) < max(ragged.flat(counts))

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


WINDOW_SLOTS = 4096  # slots of each head on the device at a time when everything is read


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """Slots in a tier, and the index of their pages on the device."""

    policy: PagePolicy
    counts: Counts
    stored: Pages
    index: PageIndex

    @classmethod
    def empty(cls, like: Part, policy: PagePolicy, reference: Tensor | None) -> "PageTable":
        """Open a table without slots for parts like this one."""
        device = next(iter(like.tensors()))[1].device
        return cls(
            policy=policy,
            counts=tuple(tuple(0 for _ in row) for row in like.counts),
            stored=like.pages(policy.tier),
            index=PageIndex.empty(len(ragged.flat(like.counts)), device, reference),
        )

    @property
    def heads(self) -> int:
        """Count the heads of a row."""
        return len(self.counts[0])

    @property
    def held(self) -> tuple[int, ...]:
        """List the slots of each of the N heads."""
        return ragged.flat(self.counts)

    def budgets(self) -> list[int]:
        """List how many slots each head may read."""
        return [min(self.policy.budget_of(held), held) for held in self.held]

    def newest(self) -> list[int]:
        """List how many of each head's newest slots are always read."""
        pairs = zip(self.held, self.index.closed, strict=True)
        return [self.policy.newest(held, closed) for held, closed in pairs]

    def slack(self) -> dict[str, int]:
        """Count the bytes of room for slots and pages to come, as the part names its tensors."""
        of_index = {f"index.{name}": size for name, size in self.index.slack.items()}
        return self.stored.slack(self.counts) | of_index

    def appended(self, fresh: Part) -> "PageTable":
        """Offload slots behind the others. They are not indexed yet."""
        stored = self.stored.append(self.counts, fresh)
        return replace(self, stored=stored, counts=ragged.added(self.counts, fresh.counts))

    def indexed(self, transcript: Transcript) -> "PageTable":
        """Cut the text into pages from each head's last cut on, and digest the finished ones."""
        lengths = []
        for head, (first, held) in enumerate(zip(self.index.closed, self.held, strict=True)):
            positions = self.stored.positions(head, first, held)  # of slots that are in no page yet
            classes = transcript.classes_at(head // self.heads, positions)  # N -> row
            lengths.append(self.policy.cut(classes))
        if not any(lengths):
            return self
        index = self.index
        # The first turn may be short: until there are enough keys, folds measure all of them again.
        unsettled = index.unsettled(lengths) if self.policy.sketches else set()
        keys, whole = [], {}
        for head, (first, of_head) in enumerate(zip(index.closed, lengths, strict=True)):
            if of_head:
                begin = 0 if head in unsettled else first
                read = self.stored.keys(head, begin, first + sum(of_head))
                keys.append(read[first - begin :])
                if head in unsettled:
                    whole[head] = read
        joined = torch.cat(keys)
        flat = torch.tensor([length for of_head in lengths for length in of_head], device=joined.device)
        digest = self.policy.digest(joined, flat)
        if whole:
            index = index.refitted(whole)
        return replace(self, index=index.extend(lengths, digest))

    def query_scores(
        self,
        recent: QueryWindow | None,
        scale: float,
    ) -> Float[Tensor, "B S"] | None:
        """Score each slot by the maximum attention of recent queries, pooled and dilated.

        None where heads hold different slots, where nothing is indexed yet, or where no queries were recorded.
        """
        alike = all(len({*row}) == 1 for row in self.counts)  # heads of a row hold equally many
        if recent is None or not alike or not self.index.closed[0]:
            return None
        held, most = self.held, max(self.held)
        found = []
        for start in range(0, most, WINDOW_SLOTS):
            stop = min(start + WINDOW_SLOTS, most)
            keys = self.stored.window(start, stop)[0].unflatten(0, (-1, self.heads))  # B H S D
            # All heads of a row have the same positions: the first one's are read.
            rows = range(0, len(held), self.heads)
            at = torch.stack([self.stored.positions(head, start, stop) for head in rows])
            visible = recent.positions[..., None] >= at[:, None].to(keys.device)  # B W S
            of_window = max_attention_scores(
                recent.queries,
                keys,
                recent.log_sum_exp,
                scale=scale,
                seen=visible,
            )
            found.append(of_window)
        scores = torch.cat(found, dim=2)  # B H S
        counts = torch.tensor(held[:: self.heads], device=scores.device)[:, None, None]  # B 1 1
        behind = torch.arange(scores.shape[2], device=scores.device) >= counts  # rows with fewer slots
        return pool_and_dilate(scores.masked_fill_(behind, 0.0), pool=POOL, reach=self.policy.around)

    def select(self, step: AttentionStep, current: PageSelection) -> PageSelection:
        """Select slots for new queries; pages that are selected now have an advantage of `stay`."""
        pinned = current.pinned
        # After a forward of several tokens, which read everything, layers choose together.
        if current.slots is None and self.policy.reads_all and self.policy.query_scores:
            pinned = self._pinned(step, pinned)
        return PageSelection(
            slots=self._filled(step, current, pinned),
            since=(step.queries.shape[2],) * len(self.counts),
            mean_query=step.mean_query(self.heads),
            pinned=pinned,
        )

    def _pinned(
        self,
        step: AttentionStep,
        before: Tensor | None,
    ) -> Bool[Tensor, "N M"] | None:
        """Mark the pages with the best scores of any layer, as far as their share of the budget goes."""
        scores = joint_query_scores(step)
        if scores is None:
            return before
        # A budget that one attended token and its surroundings would take is better spent by the index.
        least = 2 * self.policy.around
        slots = []
        for budget, newest in zip(self.budgets()[:: self.heads], self.newest()[:: self.heads], strict=True):
            share = int(self.policy.query_scores * (budget - newest))
            slots.append(max(share - least, 0))
        return best_pages(self.index, scores, slots=slots)

    def _filled(
        self,
        step: AttentionStep,
        current: PageSelection,
        pinned: Bool[Tensor, "N M"] | None,
    ) -> Int[Tensor, "N budget"]:
        """Fill each head's budget, page by page in order of score."""
        held, budgets = self.held, self.budgets()
        scores = None
        if self.index.pages.held and _any_smaller(budgets, held):
            queries, real = step.newest(self.policy.choosing, self.heads)
            scores = self.index.rank(queries, real, scale=step.scale)
            if self.policy.stay and current.slots is not None:
                # A page is there if its first slot is: pages are taken from their beginning.
                there = self.index.first_slot_selected(current.slots, stored=max(held))
                scores = scores + self.policy.stay * there  # True counts as 1
            if pinned is not None:
                scores = scores.masked_fill(pinned, torch.inf)  # before all others
        return fill_budget(
            self.index,
            scores,
            counts=held,
            budgets=budgets,
            newest=self.newest(),
        )


def _any_smaller(budgets: Sequence[int], held: Sequence[int]) -> bool:
    """Tell whether any head may read fewer slots than it holds."""
    return any(budget < count for budget, count in zip(budgets, held, strict=True))
