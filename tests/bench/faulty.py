"""A suite with planted faults, in a module of its own so that workers elsewhere can import it.

Each sample is a short list of tokens; its score is a number that only the model's own arithmetic can give, so equal
scores mean equal bits. A fault happens at one sample: the process dies once, or fails always, or refuses.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from kvfold.bench.suite import Outcome, Suite
from kvfold.chat.rows import Rows
from kvfold.errors import SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultySuite(Suite):
    """Asks a model for its logits; breaks where it is told to."""

    folder: Path = Path()
    dies_at: int | None = None
    fails_at: int | None = None
    refuses_at: int | None = None

    name = "faulty"
    version = 1
    rows = 2

    @property
    def settings(self):
        return {}

    def samples(self, *, n, seed):
        return [(i, [(7 * i + j * seed) % 200 for j in range(9 + i)]) for i in range(n)]

    def shortcut(self, samples):
        return None

    def ask(self, subject, plan, samples):
        for number, _ in samples:
            self._break(number)
        rows = Rows(subject.model, plan, rows=len(samples))
        rows.feed([tokens for _, tokens in samples])
        rows.fold()
        expected = rows.logits([[1] for _ in samples])
        spent = rows.ledger()
        sizes = {name: getattr(spent, name) for name in ("stored", "resident", "attended")}
        sizes |= {name: getattr(spent, name) for name in ("stored_bytes", "resident_bytes", "full_bytes")}
        return [
            Outcome(family="all", score=float(row.double().sum()), **sizes, ttft_seconds=0.0, tpot_seconds=0.0)
            for row in expected
        ]

    def _break(self, number: int) -> None:
        if number == self.dies_at and not (self.folder / "died").exists():
            (self.folder / "died").write_text("")
            os._exit(1)
        if number == self.fails_at:
            with (self.folder / "tries").open("a") as tries:
                tries.write("again ")
            raise RuntimeError("always")
        if number == self.refuses_at:
            with (self.folder / "refusals").open("a") as refusals:
                refusals.write("once ")
            raise SuiteError("a mistake of yours")
