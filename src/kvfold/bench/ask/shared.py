"""The beginning of some conversations, read once for several plans that differ in what they do when they fold.

Before its first fold a cache holds raw tokens, whatever its plan. So one cache reads for all, records what any of the
plans needs, and is forked once a plan. Plans that place slots, and rivals, read by themselves; so does a plan that is
alone. Who asks need not know which is which.
"""

from collections.abc import Sequence

from kvfold.bench.ask.audit import AuditedRows
from kvfold.bench.ask.reader import Reader, open_rows
from kvfold.bench.ask.replayed_once import ReplayedOnce, Replays
from kvfold.bench.peers.plans import is_rival
from kvfold.bench.subject import Subject
from kvfold.plan import Plan

Chunks = Sequence[Sequence[int]]


def sharers(plans: Sequence[str]) -> list[str]:
    """List the plans that can share the reading of a text."""
    return [plan for plan in plans if not is_rival(plan) and Plan.parse(plan).shares_prefill]


class SharedRows:
    """Rows that have read and not folded, for several plans. It changes with every feed."""

    def __init__(self, subject: Subject, plans: Sequence[str], *, count: int) -> None:
        """`plans` are those that `under` will be asked for."""
        together = sharers(plans)
        self._subject = subject
        self._count = count
        self._sharers = frozenset(together) if len(together) > 1 else frozenset()
        self._fed: list[list[list[int]]] = []  # what plans that read by themselves are fed
        self._rows: AuditedRows | None = None
        self._replays = Replays()
        if self._sharers:
            pad = subject.tokenizer.pad_token_id or 0
            for_plans = [Plan.parse(plan) for plan in together]
            self._rows = AuditedRows(subject.model, "full", rows=count, pad=pad, for_plans=for_plans)

    def feed(self, chunks: Chunks) -> None:
        """Read one chunk a row; a row may have none."""
        self._fed.append([list(chunk) for chunk in chunks])
        self._replays = Replays()  # those of before are of a shorter text
        if self._rows is not None:
            self._rows.feed(chunks)

    @property
    def reading(self) -> AuditedRows:
        """The rows that read for all; what they answer now, before any fold, every plan would."""
        assert self._rows is not None, "plans share what they read"
        return self._rows

    def shares(self, plan: str) -> bool:
        """Say whether a plan goes on from what was read for all."""
        return plan in self._sharers

    def under(self, plan: str) -> Reader:
        """Give rows that have read what was fed, and go on by this plan."""
        if self._rows is not None and self.shares(plan):
            fork = self._rows.under(plan)
            assert isinstance(fork, AuditedRows), "a fork is what it was forked from"
            assert fork.folded is not None, "a fork folds"
            memory = fork.folded.memory
            memory.access = ReplayedOnce(memory.access, self._replays)
            return fork
        rows = open_rows(self._subject, plan, count=self._count)
        for chunks in self._fed:
            rows.feed(chunks)
        return rows
