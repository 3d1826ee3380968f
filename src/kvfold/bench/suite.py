"""What a suite promises: samples that follow from a seed, and an outcome for each under a plan.

A suite is one file in `suites/` that ends in `SUITE = ...`; the file's name is the suite's name on the command line,
so adding one touches no other file. Samples and scoring are frozen under the suite's version. The runner chooses
the plans and keeps the records; a suite knows nothing of files, tables or of other suites.
"""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from kvfold.bench import suites
from kvfold.bench.choices import as_json
from kvfold.bench.reader import Reader
from kvfold.budget.ledger import Ledger
from kvfold.errors import SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model that is asked, and how records call it."""

    name: str
    model: Any  # a transformers model; only hf/ knows more
    tokenizer: Any
    fingerprint: str
    dtype: str
    device: str
    rivals: Any = None  # peers.rivals.Rivals, where rivals run beside our plans

    def rows(self, plan: str | None, *, count: int) -> Reader:
        """Conversations side by side under a plan, ours (checked while they run) or a rival's; None never folds."""
        from kvfold.bench.ask.audit import AuditedRows
        from kvfold.bench.peers.plans import is_rival

        if plan is None or not is_rival(plan):
            return AuditedRows(self.model, plan, rows=count, pad=self.tokenizer.pad_token_id or 0)
        if self.rivals is None:
            raise SuiteError(f"the rival {plan} was asked for; none was called into this run; give it by --peers")
        return self.rivals.rows(plan, count=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One sample under one plan: how well it was answered, and what the cache held when it was asked."""

    family: str
    score: float
    stored: float
    resident: float
    attended: float
    stored_bytes: float
    resident_bytes: float
    full_bytes: float
    ttft_seconds: float  # from the question to the first token of the answer
    tpot_seconds: float  # per token after the first
    claimed: float | None = None  # the kept fraction that a rival reports itself; ours report what is measured
    metrics: Mapping[str, float] = field(default_factory=dict)  # what else was measured, by its key in records


def held(spent: Ledger, *, rows: int) -> dict[str, Any]:
    """The fields of an Outcome that say what the cache held, from the ledger of this many rows together."""
    return {
        "stored": spent.stored,
        "resident": spent.resident,
        "attended": spent.attended,
        "stored_bytes": spent.stored_bytes / rows,
        "resident_bytes": spent.resident_bytes / rows,
        "full_bytes": spent.full_bytes / rows,
        "claimed": spent.claimed,
    }


class Suite(ABC):
    """A set of questions that stays the same for ever under its version and settings.

    What a user may choose (`choices.py`) are the fields of a suite that is a frozen dataclass, each with a default.
    """

    name: str
    version: int
    rows: int  # samples that are asked together
    query_aware: bool = False  # is the question known when the history folds
    has_floor: bool = True  # does forgetting everything score low; else nobody is warned where it does not
    data_file: str = ""  # what is read where `--data` is a folder
    scopes: tuple[str, ...] = ()  # scopes in which an evicting plan is run when its text names none

    @property
    def settings(self) -> Mapping[str, Any]:
        """What shapes the samples, in JSON's types; part of what a record is compared on."""
        return as_json(self)

    def at(self, folder: Path) -> "Suite":
        """The same suite, told where the records go; one that keeps more than records keeps it there."""
        return self

    @abstractmethod
    def samples(self, *, n: int, seed: int) -> Sequence[Any]:
        """As many samples as asked, always the same for the same seed, the families in turn."""

    @abstractmethod
    def shortcut(self, samples: Sequence[Any]) -> Mapping[str, float] | None:
        """What the best trick without memory of bindings scores in each family; None where there is none."""

    def foretold(self, subject: Subject, plan: str) -> str:
        """What can be said before a plan is measured, such as a time that it cannot beat; "" where nothing can."""
        return ""

    def metrics(self, outcomes: Sequence[Outcome]) -> Mapping[str, float]:
        """What records hold beside the score: the mean of each metric over the samples that have it."""
        names = dict.fromkeys(name for outcome in outcomes for name in outcome.metrics)
        return {name: fmean(outcome.metrics[name] for outcome in outcomes if name in outcome.metrics) for name in names}

    @abstractmethod
    def ask(self, subject: Subject, plan: str, samples: Sequence[Any]) -> list[Outcome]:
        """Put some samples, at most `rows`, to the model under a plan; one outcome each, in order."""


def names() -> list[str]:
    """Every suite there is a file for."""
    return sorted(module.name for module in pkgutil.iter_modules(suites.__path__))


def find(name: str) -> Suite:
    """The suite of that name, written with - or _."""
    known, name = names(), name.replace("-", "_")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(known)}"
        raise SuiteError(f"suite {name!r} was asked for; there is none of that name; {hint}")
    return import_module(f"{suites.__name__}.{name}").SUITE
