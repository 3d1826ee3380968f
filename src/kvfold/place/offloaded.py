"""OffloadedPart: slots that lie in a tier, an index of their pages on the device, and the few that are fetched.

Forwards of one token read the selected slots only; a selection made now and then says which these are. Forwards of
several tokens read everything, streamed through the device in windows, unless the policy has them select as well. When
pages are selected, and how they are scored, is the policy's business (sentkv.py); how a slot is written, its codec's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, partial
from kvfold.attention.scores import POOL, max_attention_scores, pool_and_dilate
from kvfold.memory import ragged
from kvfold.memory.kv import KV
from kvfold.memory.pages import Pages
from kvfold.memory.part import Part, State, Usage
from kvfold.memory.ragged import Counts
from kvfold.memory.recent_queries import QueryWindow
from kvfold.memory.step import AttentionStep
from kvfold.memory.transcript import Transcript
from kvfold.place.mean_slot import SlotSums, mean_of_unselected
from kvfold.place.page_index import PageIndex, best_pages, fill_budget
from kvfold.place.page_selection import PageSelection, joint_query_scores
from kvfold.place.policy import PagePolicy
from kvfold.place.working_set import FetchStats, WorkingSet

_WINDOW_SLOTS = 4096  # slots of each head on the device at a time when everything is read
_SAVED = {"selected": "selected", "mean_query": "before", "pinned": "firm"}  # selections, as files call them


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadedPart(Part):
    """Slots of some rows and heads in a tier. Store and working set are shared and change; the rest is a value."""

    policy: PagePolicy
    counts: Counts
    stored: Pages
    index: PageIndex
    working: WorkingSet
    selection: PageSelection = field(default_factory=PageSelection)
    sums: SlotSums | None = None  # over all slots, where those not selected are read as their mean
    transcript: Transcript = field(default_factory=Transcript)  # of the text up to the last fold

    SAVED: ClassVar[str] = "tiered_"  # how a state names tensors that are not the slots' own

    @classmethod
    def of(cls, fresh: Part, policy: PagePolicy, transcript: Transcript, *, stats: FetchStats | None = None,
           reference: Tensor | None = None) -> "OffloadedPart":  # fmt: skip
        """Offload slots; counters and the index's reference go on where another part left off."""
        device = next(iter(fresh.tensors()))[1].device
        part = cls(
            policy=policy,
            counts=tuple(tuple(0 for _ in row) for row in fresh.counts),
            stored=fresh.pages(policy.tier),
            index=PageIndex.empty(len(ragged.flat(fresh.counts)), device, reference),
            working=WorkingSet(stats),
            selection=PageSelection(since=(0,) * len(fresh.counts)),
        )
        return part.extend(fresh, transcript)

    # Attention --------------------------------------------------------------------------------------------------

    def attend(self, step: AttentionStep) -> tuple[Partial, "OffloadedPart"]:
        """Attend over what is selected, or over everything; select anew where that is due."""
        new = step.queries.shape[2]
        if step.forward is None:
            return self._answer(step), self
        if new > 1 and self.policy.reads_all:
            part = replace(self, selection=self.selection.of_everything())
            return part._answer(step), part
        part, answers, start = self, [], 0
        while start < new:
            stop = start + min(new - start, part._tokens_until_due())
            piece = step if (start, stop) == (0, new) else step.piece(start, stop)
            with torch.no_grad(), torch.inference_mode(False):
                part = part._selecting(piece)
            answers.append(part._answer(piece))
            start = stop
        if len(answers) == 1:
            return answers[0], part
        output = torch.cat([answer.output for answer in answers], dim=2)
        return Partial(output, torch.cat([answer.log_sum_exp for answer in answers], dim=2)), part

    def query_scores(self, recent: QueryWindow | None, scale: float) -> Float[Tensor, "B S"] | None:
        """Score each slot by the maximum attention of recent queries, pooled and dilated.

        None where heads hold different slots, where nothing is indexed yet, or where no queries were recorded.
        """
        heads, counts = len(self.counts[0]), ragged.flat(self.counts)
        alike = all(len({*row}) == 1 for row in self.counts)
        if recent is None or not alike or not self.index.closed[0]:
            return None
        began = perf_counter()
        found = []
        for start in range(0, max(counts), _WINDOW_SLOTS):
            stop = min(start + _WINDOW_SLOTS, max(counts))
            keys = self.stored.window(start, stop)[0].unflatten(0, (-1, heads))
            at = torch.stack([self.stored.positions(head, start, stop) for head in range(0, len(counts), heads)])
            visible = recent.positions[..., None] >= at[:, None].to(keys.device)
            found.append(max_attention_scores(recent.queries, keys, recent.log_sum_exp, scale=scale, seen=visible))
        scores = torch.cat(found, dim=2)
        held = torch.tensor(counts[::heads], device=scores.device)[:, None, None]
        scores.masked_fill_(torch.arange(scores.shape[2], device=scores.device) >= held, 0.0)
        self.working.stats.select_seconds += perf_counter() - began
        return pool_and_dilate(scores, pool=POOL, reach=self.policy.around)

    def _tokens_until_due(self) -> int:
        """Count the new tokens that may attend before the next selection can be due."""
        return self.policy.tokens_until_due(self.selection.since if self.selection.slots is not None else (0,))

    def _selecting(self, step: AttentionStep) -> "OffloadedPart":
        """Select pages for new queries, where that is due."""
        selection, new, heads = self.selection, step.queries.shape[2], len(self.counts[0])
        since = tuple(tokens + new for tokens in selection.since)
        due = [True] * len(since)
        if selection.slots is not None:
            due = self.policy.due(selection.since, step, selection.mean_query)
        if not any(due):
            return replace(self, selection=replace(selection, since=since))
        began = perf_counter()
        pinned = selection.pinned
        if selection.slots is None and self.policy.reads_all and self.policy.query_scores:
            pinned = self._pinned(step)
        fresh = PageSelection(
            slots=self._selected(step, pinned),
            since=(new,) * len(since),
            mean_query=step.mean_query(heads),
            pinned=pinned,
        )
        mixed = replace(selection, since=since).mixed(fresh, due, heads)
        self.working.stats.select_seconds += perf_counter() - began
        return replace(self, selection=mixed)

    def _pinned(self, step: AttentionStep) -> Bool[Tensor, "N M"] | None:
        """Mark the pages with the best scores of any layer, as far as their share of the budget goes."""
        scores = joint_query_scores(step)
        if scores is None:
            return self.selection.pinned
        heads = len(self.counts[0])
        free = zip(self._budgets()[::heads], self._newest()[::heads], strict=True)
        # A budget that one attended token and its surroundings would take is better spent by the index.
        least = 2 * self.policy.around
        slots = [max(int(self.policy.query_scores * (budget - newest)) - least, 0) for budget, newest in free]
        return best_pages(self.index, scores, slots=slots)

    def _selected(self, step: AttentionStep, pinned: Bool[Tensor, "N M"] | None) -> Tensor:
        """Select slots for the newest queries, page by page in order of score."""
        counts, budgets = ragged.flat(self.counts), self._budgets()
        scores = None
        if self.index.centres is not None and any(b < held for b, held in zip(budgets, counts, strict=True)):
            queries, real = step.newest(self.policy.choosing, len(self.counts[0]))
            scores = self.policy.rank(self.index, queries, real, scale=step.scale)
            if self.policy.stay and self.selection.slots is not None:
                there = self.index.first_slot_selected(self.selection.slots, stored=max(counts))
                scores = scores + self.policy.stay * there
            if pinned is not None:
                scores = scores.masked_fill(pinned, torch.inf)
        return fill_budget(self.index, scores, counts=counts, budgets=budgets, newest=self._newest())

    def _answer(self, step: AttentionStep) -> Partial:
        """Attend, with rows and heads as one dimension."""
        heads = len(self.counts[0])
        rows, query_heads, new, size = step.queries.shape
        queries = step.queries.reshape(rows * heads, query_heads // heads, new, size)
        everything = self.selection.slots is None or (new > 1 and self.policy.reads_all)
        answer = (self._over_all if everything else self._over_selected)(queries, step.scale)
        return Partial(
            answer.output.reshape(rows, query_heads, new, -1), answer.log_sum_exp.reshape(rows, query_heads, new)
        )

    def _over_selected(self, queries: Tensor, scale: float) -> Partial:
        working, counts, selected = self.working, ragged.flat(self.counts), self.selection.slots
        assert selected is not None
        if not self.policy.reuse and not working.is_current(selected):
            working.forget()
        working.fetch(
            selected,
            self.stored.fetch,
            stored=max(counts),
            heads=len(self.counts[0]),
            lineage=self.stored.lineage,
        )
        assert working.keys is not None
        assert working.values is not None
        began = perf_counter()
        mask = None if working.valid is None else working.valid[:, None, None]
        answer = partial(queries, working.keys[:, None], working.values[:, None], scale=scale, mask=mask)
        budgets = self._budgets()
        if self.sums is not None and sum(counts) > sum(budgets):
            answer = merge([answer, mean_of_unselected(queries, self.sums, working, counts, budgets, scale=scale)])
        working.stats.attend_seconds += perf_counter() - began
        return answer

    def _over_all(self, queries: Tensor, scale: float) -> Partial:
        """Attend over everything, a window at a time."""
        counts = ragged.flat(self.counts)
        answers = []
        held = torch.tensor(counts, device=queries.device)[:, None, None, None]
        for start in range(0, max(counts), _WINDOW_SLOTS):
            stop = min(start + _WINDOW_SLOTS, max(counts))
            keys, values = self.stored.window(start, stop)
            # Heads with fewer slots have anything behind them.
            mask = torch.arange(start, stop, device=queries.device) < held if stop > min(counts) else None
            answers.append(partial(queries, keys[:, None], values[:, None], scale=scale, mask=mask))
        return merge(answers)

    def _budgets(self) -> list[int]:
        return [min(self.policy.budget_of(held), held) for held in ragged.flat(self.counts)]

    def _newest(self) -> list[int]:
        pairs = zip(ragged.flat(self.counts), self.index.closed, strict=True)
        return [self.policy.newest(held, closed) for held, closed in pairs]

    # Folding ----------------------------------------------------------------------------------------------------

    def extend(self, other: Part, transcript: Transcript) -> "OffloadedPart":
        """Offload slots behind the others, cut them into pages, and digest these."""
        began = perf_counter()
        before = ragged.flat(self.counts)
        stored = self.stored.append(self.counts, other)
        moved = perf_counter()
        grown = replace(
            self,
            stored=stored,
            counts=ragged.added(self.counts, other.counts),
            selection=self.selection.of_everything(),
            transcript=transcript,
        )
        sums = None
        if self.policy.mean_slot:
            after, device = ragged.flat(grown.counts), self.index.starts.device
            sums = SlotSums.extended(self.sums, stored, before, after, device)
        grown = replace(grown, index=grown._indexed(), sums=sums)
        self.working.stats.write_seconds += moved - began
        self.working.stats.index_seconds += perf_counter() - moved
        return grown

    def _indexed(self) -> PageIndex:
        """Index all slots: from each head's last cut on, text is cut anew."""
        counts = ragged.flat(self.counts)
        lengths = []
        for head, (first, held) in enumerate(zip(self.index.closed, counts, strict=True)):
            row = head // len(self.counts[0])
            positions = self.stored.positions(head, first, held)
            lengths.append(self.policy.cut(self.transcript.classes_at(row, positions)))
        if not any(lengths):
            return self.index
        keys = torch.cat(
            [
                self.stored.keys(head, first, first + sum(of_head))
                for head, (first, of_head) in enumerate(zip(self.index.closed, lengths, strict=True))
                if of_head
            ]
        )
        flat = torch.tensor([length for of_head in lengths for length in of_head], device=keys.device)
        return self.index.extend(lengths, self.policy.digest(keys, flat))

    def keep(self, kept: Bool[Tensor, " slots"]) -> "OffloadedPart":
        """Keep some slots in a fresh store, cut anew; what the others took is freed."""
        some = self.stored.whole(self.counts).keep(kept)
        return OffloadedPart.of(
            some, self.policy, self.transcript, stats=self.working.stats, reference=self.index.reference
        )

    def take_rows(self, rows: Sequence[int]) -> "OffloadedPart":
        """Pick rows into a fresh store, with what they had selected."""
        number = len(self.counts[0])
        device = self.index.starts.device
        heads = torch.tensor([row * number + head for row in rows for head in range(number)], device=device)
        reference = None if self.index.reference is None else self.index.reference[heads]
        part = OffloadedPart.of(
            self.stored.whole(self.counts).take_rows(rows),
            self.policy,
            self.transcript.take_rows(rows),
            stats=self.working.stats,
            reference=reference,
        )
        return replace(part, selection=self.selection.take_rows(rows, heads))

    def fork(self) -> "OffloadedPart":
        """Share the store, and start a working set that is not shared."""
        return replace(self, working=WorkingSet(replace(self.working.stats)))

    def read(self, heads: slice = slice(None)) -> KV:
        """Fetch and decode the slots of some heads."""
        return self.stored.whole(self.counts).read(heads)

    # What it holds ----------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the stored slots, and on the device the index, the working set and what selections leave behind."""
        yield from self.stored.tensors()
        yield from ((f"index.{name}", tensor) for name, tensor in self.index.tensors())
        yield from ((f"working.{name}", tensor) for name, tensor in self.working.tensors())
        yield from ((f"index.{name}", tensor) for name, tensor in self.selection.tensors())
        if self.sums is not None:
            yield from (("index.sum_keys", self.sums.keys), ("index.sum_values", self.sums.values))
        # The text is the transcript's, but an older one than the memory's may be held here.
        yield from ((f"index.{name}", tensor) for name, tensor in self.transcript.tensors() if name == "classes")

    def usage(self) -> Usage:
        """Say what is selected, which tensors lie in the tier, and what fetching has cost."""
        tier = self.policy.tier.name
        tiers = {} if tier == "device" else {name: tier for name, _ in self.stored.tensors()}
        return Usage(attended_slots=sum(self._budgets()), tiers=tiers, fetched=self.working.stats.counts())

    def state(self) -> State:
        """Give the slots in their own layout, and what was selected: the index follows from them."""
        plain, tensors = self.stored.whole(self.counts).state()
        more = {_SAVED[name]: tensor for name, tensor in self.selection.tensors()}
        if self.index.reference is not None:
            more["usual"] = self.index.reference
        tensors |= {f"{self.SAVED}{name}": tensor for name, tensor in more.items()}
        return {**plain, "since": list(self.selection.since)}, tensors

    def with_saved_selection(self, since: Sequence[int], tensors: Mapping[str, Any]) -> "OffloadedPart":
        """Put back a selection that was saved, by the names that files use."""
        saved = {name: tensors.get(said) for name, said in _SAVED.items()}
        selection = PageSelection(
            slots=saved["selected"],
            since=tuple(since),
            mean_query=saved["mean_query"],
            pinned=saved["pinned"],
        )
        return replace(self, selection=selection)
