"""OffloadedPart: slots that lie in a tier, an index of their pages on the device, and the few that are fetched.

Tokens that a model says read the selected slots only; a selection made now and then says which these are. A text that
it is given reads everything, streamed through the device in windows, unless the policy has it select as well. What
is selected is the page table's business (page_table.py); how a slot is written is its codec's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.kernels.compiled import Stored, decodes
from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, joined, partial
from kvfold.memory.kv import KV
from kvfold.memory.part import Part, State, Usage
from kvfold.memory.ragged import Counts
from kvfold.memory.recent_queries import QueryWindow
from kvfold.memory.step import AttentionStep
from kvfold.memory.transcript import Transcript
from kvfold.place.mean_slot import SlotSums, mean_of_unselected
from kvfold.place.page_table import WINDOW_SLOTS, PageSelection, PageTable
from kvfold.place.policy import PagePolicy
from kvfold.place.working_set import FetchStats, WorkingSet


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadedPart(Part):
    """Slots of some rows and heads in a tier. Store and working set are shared and change; the rest is a value."""

    counts: Counts
    table: PageTable
    working: WorkingSet
    selection: PageSelection
    sums: SlotSums | None = None  # over all slots, where those not selected are read as their mean
    transcript: Transcript = field(default_factory=Transcript)  # of the text up to the last fold

    SAVED: ClassVar[str] = "tiered_"  # how a state names tensors that are not the slots' own

    @classmethod
    def of(cls, fresh: Part, policy: PagePolicy, transcript: Transcript, *, stats: FetchStats | None = None,
           reference: Tensor | None = None) -> "OffloadedPart":  # fmt: skip
        """Offload slots; counters and the index's reference go on where another part left off."""
        table = PageTable.empty(fresh, policy, reference)
        since = (0,) * len(fresh.counts)
        part = cls(
            counts=table.counts,
            table=table,
            working=WorkingSet(stats),
            selection=PageSelection(since=since),
        )
        return part.extend(fresh, transcript)

    def attend(self, step: AttentionStep) -> tuple[Partial, "OffloadedPart"]:
        """Attend over what is selected, or over everything; select anew where that is due."""
        new = step.queries.shape[2]  # tokens
        if step.forward is None:  # a pass selects nothing anew
            return self._answer(step), self
        if step.is_text and self.table.policy.reads_all:
            part = replace(self, selection=self.selection.of_everything())
            return part._answer(step), part
        part, answers, start = self, [], 0  # part: as it is after each selection
        while start < new:
            stop = min(new, start + part._tokens_until_due())
            piece = step if (start, stop) == (0, new) else step.piece(start, stop)
            with torch.inference_mode(False), torch.no_grad():
                part = part._selecting(piece)
            answers.append(part._answer(piece))
            start = stop
        return joined(answers), part

    def stored_for(self, step: AttentionStep) -> tuple[Stored | None, Part]:
        """Say where the selected slots lie, selected anew where that is due, and give the part afterwards."""
        # Heads that hold differently many may read differently many: places stay empty, which the kernel cannot read.
        reads_all = step.is_text and self.table.policy.reads_all
        if step.forward is None or reads_all or self.sums is not None or len(set(self.table.held)) > 1:
            return None, self
        if not decodes(step.queries, step.scale):
            return None, self
        with torch.inference_mode(False), torch.no_grad():
            part = self._selecting(step)
        assert part.selection.slots is not None, "a token that is said reads what is selected"
        part._fetch(part.selection.slots)
        stored = part.working.stored
        return stored, self if stored is None else part

    def query_scores(self, recent: QueryWindow | None, scale: float) -> Float[Tensor, "B S"] | None:
        """Score each slot by the maximum attention of recent queries; None where PageTable.query_scores gives none."""
        began = perf_counter()
        scores = self.table.query_scores(recent, scale)
        self.working.stats.select_seconds += perf_counter() - began
        return scores

    def _tokens_until_due(self) -> int:
        """Count the new tokens that may attend before the next selection can be due."""
        since = (0,) if self.selection.slots is None else self.selection.since
        return self.table.policy.tokens_until_due(since, stored=max(self.table.held))

    def _selecting(self, step: AttentionStep) -> "OffloadedPart":
        """Select pages for new queries, where that is due."""
        policy, current = self.table.policy, self.selection
        since = tuple(tokens + step.queries.shape[2] for tokens in current.since)
        due = [True] * len(since)  # nothing is selected yet
        if current.slots is not None:
            due = policy.due(current.since, step, current.mean_query, stored=max(self.table.held))
        if not any(due):
            return replace(self, selection=replace(current, since=since))
        began = perf_counter()
        fresh = self.table.select(step, current)
        selection = replace(current, since=since).mixed(fresh, due, self.table.heads)
        self.working.stats.select_seconds += perf_counter() - began
        return replace(self, selection=selection)

    def _answer(self, step: AttentionStep) -> Partial:
        """Attend with rows and heads as one dimension: queries [N, group, Q, D] over one key/value head each."""
        heads = self.table.heads
        rows, query_heads, new, size = step.queries.shape
        queries = step.queries.reshape(rows * heads, query_heads // heads, new, size)
        reads_all = step.is_text and self.table.policy.reads_all
        if reads_all or self.selection.slots is None:
            answer = _over_all(self.table, queries, step.scale)
        else:
            answer = self._over_selected(queries, self.selection.slots, step.scale)
        output = answer.output.reshape(rows, query_heads, new, -1)
        return Partial(output, answer.log_sum_exp.reshape(rows, query_heads, new))

    def _over_selected(self, queries: Tensor, selected: Tensor, scale: float) -> Partial:
        """Fetch the selected slots that are not in the working set, and attend over all selected ones."""
        working, held, budgets = self.working, self.table.held, self.table.budgets()
        self._fetch(selected)
        assert working.keys is not None
        assert working.values is not None
        began = perf_counter()
        mask = None if working.valid is None else working.valid[:, None, None]  # N 1 1 budget
        answer = partial(queries, working.keys[:, None], working.values[:, None], scale=scale, mask=mask)
        if self.sums is not None and sum(held) > sum(budgets):
            rest = mean_of_unselected(queries, self.sums, working, held, budgets, scale=scale)
            answer = merge([answer, rest])
        working.stats.attend_seconds += perf_counter() - began
        return answer

    def _fetch(self, selected: Tensor) -> None:
        """Fetch the selected slots that are not in the working set."""
        working, table, stored = self.working, self.table, self.table.stored
        if not table.policy.reuse and not working.is_current(selected):
            working.forget()
        with torch.inference_mode(False), torch.no_grad():  # later steps write into its buffers, in any mode
            working.fetch(selected, stored.fetch, stored=max(table.held), heads=table.heads, lineage=stored.lineage)

    def extend(self, other: Part, transcript: Transcript, most: int = 0) -> "OffloadedPart":
        """Offload slots behind the others, cut them into pages, and digest these."""
        stats, began = self.working.stats, perf_counter()
        table = self.table.appended(other)
        moved = perf_counter()
        sums = self.sums
        if table.policy.mean_slot:
            sums = SlotSums.extended(sums, table.stored, self.table.held, table.held, table.index.starts.device)
        table = table.indexed(transcript)
        stats.write_seconds += moved - began
        stats.index_seconds += perf_counter() - moved
        return replace(
            self,
            counts=table.counts,
            table=table,
            selection=self.selection.of_everything(),
            sums=sums,
            transcript=transcript.without_ids(),
        )

    def keep(self, kept: Bool[Tensor, " slots"]) -> "OffloadedPart":
        """Keep the slots that are True in a fresh store, cut anew; the room of the others is freed."""
        slots = self.table.stored.whole(self.counts)
        return self._stored_anew(slots.keep(kept), self.transcript, self.table.index.reference)

    def take_rows(self, rows: Sequence[int]) -> "OffloadedPart":
        """Pick rows into a fresh store, with what they had selected."""
        index, number = self.table.index, self.table.heads
        of_rows = [row * number + head for row in rows for head in range(number)]  # numbers among the N
        heads = torch.tensor(of_rows, device=index.starts.device)  # N of the new part
        reference = None if index.reference is None else index.reference[heads]
        slots = self.table.stored.whole(self.counts)
        part = self._stored_anew(slots.take_rows(rows), self.transcript.take_rows(rows), reference)
        return replace(part, selection=self.selection.take_rows(rows, heads))

    def _stored_anew(self, slots: Part, transcript: Transcript, reference: Tensor | None) -> "OffloadedPart":
        policy, stats = self.table.policy, self.working.stats
        return OffloadedPart.of(slots, policy, transcript, stats=stats, reference=reference)

    def fork(self) -> "OffloadedPart":
        """Share the store, and start a working set that is not shared."""
        return replace(self, working=WorkingSet(replace(self.working.stats)))

    def read(self, heads: slice = slice(None)) -> KV:
        """Fetch and decode the slots of some heads."""
        return self.table.stored.whole(self.counts).read(heads)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the stored slots, and those on the device: index, working set, selection and sums."""
        yield from self.table.stored.tensors()
        yield from _named("index", self.table.index.tensors())
        yield from _named("working", self.working.tensors())
        yield from _named("index", self.selection.tensors())
        if self.sums is not None:
            yield from (("index.sum_keys", self.sums.keys), ("index.sum_values", self.sums.values))
        # The text is the transcript's, but an older one than the memory's may be held here.
        if self.transcript.classes is not None:
            yield "index.classes", self.transcript.classes

    def usage(self) -> Usage:
        """Count the slots that a token reads; name the tensors in the tier; give the counters of fetches."""
        tier = self.table.policy.tier
        return Usage(
            attended_slots=sum(self.table.budgets()),
            tiers={name: tier.name for name, _ in self.table.stored.tensors() if tier.name != "device"},
            slack=self.table.slack(),
            file_bytes=tier.file_bytes,
            fetched=self.working.stats.counts(),
        )

    def state(self) -> State:
        """Give the slots as their layout saves them, and the selection. The index follows from the slots."""
        plain, tensors = self.table.stored.whole(self.counts).state()
        more = self.selection.saved()
        if self.table.index.reference is not None:
            more["usual"] = self.table.index.reference
        tensors |= {f"{self.SAVED}{name}": tensor for name, tensor in more.items()}
        return {**plain, "since": list(self.selection.since)}, tensors


def _over_all(table: PageTable, queries: Float[Tensor, "N group Q D"], scale: float) -> Partial:
    """Attend over everything, a window at a time."""
    held = table.held
    counts = torch.tensor(held, device=queries.device)[:, None, None, None]  # N 1 1 1
    answers = []
    for start in range(0, max(held), WINDOW_SLOTS):
        stop = min(start + WINDOW_SLOTS, max(held))
        keys, values = table.stored.window(start, stop)
        mask = None
        if stop > min(held):  # heads with fewer slots have anything behind them
            mask = torch.arange(start, stop, device=queries.device) < counts  # N 1 1 S
        answers.append(partial(queries, keys[:, None], values[:, None], scale=scale, mask=mask))
    return merge(answers)


def _named(prefix: str, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Name tensors so that the ledger counts them under one line: `prefix.name`."""
    yield from ((f"{prefix}.{name}", tensor) for name, tensor in tensors)
