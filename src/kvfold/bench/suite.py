"""What a suite promises: samples that follow from a seed, and an outcome for each under a plan.

A suite is one file in `suites/`, which finds it by its name. Samples and scoring are frozen under the suite's version.
The runner chooses the plans and keeps the records; a suite knows nothing of files, tables or of other suites.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from kvfold.bench.choices import as_json
from kvfold.bench.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one sample under one plan: its score, and the sizes of the cache when the question came."""

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
    shared_prefill: bool = False  # the text was read once for several plans
    claimed: float | None = None  # the kept fraction that a rival reports; None for our plans
    metrics: Mapping[str, float] = field(default_factory=dict)  # further measurements, by their keys in records


class Suite(ABC):
    """A set of questions that does not change under the same version and settings.

    What a user may choose (`choices.py`) are the fields of a suite that is a frozen dataclass, each with a default.
    """

    name: str
    version: int
    rows: int  # samples that are asked together
    opens_with: int = 0  # samples of the first batch, so that something is known early; 0: as many as of any
    query_aware: bool = False  # is the question known when the history folds
    has_floor: bool = True  # does forgetting everything score low; where it does not, no record warns of it
    data_file: str = ""  # the file that is read where `--data` is a folder
    is_timed: bool = False  # does it measure time, so that nothing may run beside it
    shares_prefill: bool = False  # are plans that read alike asked together
    scopes: tuple[str, ...] = ()  # scopes in which an evicting plan is run when its text names none

    @property
    def settings(self) -> Mapping[str, Any]:
        """Give the settings that shape the samples, in JSON's types. Records with others are not compared."""
        return as_json(self)

    def bound_to(self, folder: Path) -> "Suite":
        """Give a copy bound to the folder of the records, for suites that keep replies or judgements too."""
        return self

    @abstractmethod
    def samples(self, *, n: int, seed: int) -> Sequence[Any]:
        """Draw `n` samples, always the same for the same seed, the families in turn."""

    @abstractmethod
    def shortcut(self, samples: Sequence[Any]) -> Mapping[str, float] | None:
        """Score the best trick without memory of bindings in each family; None where there is none."""

    def prediction(self, subject: Subject, plan: str) -> str:
        """Predict in words what a plan will measure, such as a time that it cannot beat; "" for no prediction."""
        return ""

    def metrics(self, outcomes: Sequence[Outcome]) -> Mapping[str, float]:
        """Average each metric over the samples that have it, for the record."""
        names = dict.fromkeys(name for outcome in outcomes for name in outcome.metrics)
        return {name: fmean(outcome.metrics[name] for outcome in outcomes if name in outcome.metrics) for name in names}

    @abstractmethod
    def ask(self, subject: Subject, plan: str, samples: Sequence[Any]) -> list[Outcome]:
        """Put samples, at most `rows` of them, to the model under a plan; one outcome each, in order."""

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[Any]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Put the same samples to the model under several plans; yield a plan and outcomes as they become known.

        Outcomes are by the number of their sample among those given. In the end every plan has all.
        """
        for plan in plans:
            yield plan, dict(enumerate(self.ask(subject, plan, samples)))


class SharingSuite(Suite):
    """A suite whose plans share the reading of a text. It writes `ask_each`; `ask` is that with one plan."""

    shares_prefill = True

    @abstractmethod
    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[Any]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Put the same samples to the model under several plans, as `Suite` says."""

    def ask(self, subject: Subject, plan: str, samples: Sequence[Any]) -> list[Outcome]:
        """Put samples to the model under one plan, which shares with none."""
        found: dict[int, Outcome] = {}
        for _, some in self.ask_each(subject, [plan], samples):
            found |= some
        return [found[number] for number in range(len(samples))]
