"""A suite, a model and plans in; records out. What is finished is on the disk at once, sample by sample.

The ceiling and the floor always run: no score means anything without them. What a folder already holds is not run
again. How progress looks is the watcher's business (`live.py`), where work is done the executor's, when the time is up
the clock's.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.peers.process import PeerError
from kvfold.bench.run.clock import Clock
from kvfold.bench.run.executor import Executor, InProcess
from kvfold.bench.run.job import EDGES, Job, with_edges
from kvfold.bench.run.journal import Journal
from kvfold.bench.run.kept import KeptSamples
from kvfold.bench.run.record import Record
from kvfold.bench.run.setting import Setting
from kvfold.bench.run.summary import failed, scores_of, summarise
from kvfold.bench.run.task import Part, tasks
from kvfold.bench.suite import Outcome
from kvfold.errors import SuiteError


@runtime_checkable
class Watcher(Protocol):
    """Hears what happens while it happens."""

    def begin(self, job: Job, n: int, prediction: str) -> None: ...
    def outcomes(self, job: Job, so_far: Sequence[Outcome]) -> None: ...
    def samples(self, done: int, n: int, seconds_left: float) -> None: ...
    def finish(self, job: Job, record: Record) -> None: ...


def run(
    setting: Setting,
    jobs: Sequence[Job],
    *,
    folder: Path,
    executor: Executor,
    watcher: Watcher,
    clock: Clock | None = None,
) -> list[Record]:
    """Run every job that the folder does not hold yet; return the records of all, the ceiling and the floor first.

    Where the clock sets a limit, records are of the samples that were finished under every plan by then. Raises
    SuiteError where there are none.
    """
    journal = Journal(folder)
    shortcut = setting.suite.shortcut(setting.samples)
    known = {job: _finished(journal.find(setting.work(job.plan))) for job in with_edges(jobs)}
    fresh = [job for job, record in known.items() if record is None]
    collected = Collected(setting, fresh, KeptSamples(folder, setting))
    collected.measure(executor, watcher, clock or Clock())
    records = []
    for job, record in known.items():
        if record is None:
            record = _record(setting, job, collected, known, shortcut)
            journal.write(record)
        watcher.finish(job, record)
        records.append(record)
    if all(record.is_whole for record in records):
        collected.kept.drop()
    return records


class Collected:
    """The outcomes of some jobs, sample by sample. It changes while it measures."""

    def __init__(self, setting: Setting, jobs: Sequence[Job], kept: KeptSamples) -> None:
        self.kept = kept
        self.failures: dict[str, PeerError] = {}
        self._setting = setting
        self._jobs = {job.plan: job for job in jobs}
        self._outcomes = {job.plan: kept.find(job.plan) for job in jobs}

    def measure(self, executor: Executor, watcher: Watcher, clock: Clock) -> None:
        """Ask what is missing, until the clock has no room."""
        setting = self._setting
        for plan, job in self._jobs.items():
            watcher.begin(job, setting.n, "" if is_rival(plan) else setting.suite.prediction(setting.subject, plan))
        finished = len(self.common)
        for part in self._parts(executor, clock):
            if part.failure is not None:
                self.failures[part.plan] = part.failure
                continue
            self._take(part, watcher, clock)
            if len(self.common) > finished:
                finished = len(self.common)
                missing = sum(setting.n - len(self._outcomes[plan]) for plan in self._alive)
                watcher.samples(finished, setting.n, clock.estimate(missing))

    @property
    def common(self) -> list[int]:
        """List the samples that are finished under every plan that did not fail."""
        each = [self._outcomes[plan].keys() for plan in self._alive]
        return [number for number in range(self._setting.n) if all(number in known for known in each)]

    def samples_of(self, plan: str) -> list[int]:
        """List the samples that a record of a plan is made from: all, or else those that every plan has."""
        needed = [*(edge.plan for edge in EDGES if edge.plan in self._outcomes), plan]  # a record names the edges too
        n = self._setting.n
        is_whole = all(len(self._outcomes[one]) == n for one in needed)
        return list(range(n)) if is_whole else self.common

    def outcomes(self, plan: str, numbers: Sequence[int]) -> list[Outcome]:
        """Give the outcomes of some samples under a plan."""
        return [self._outcomes[plan][number] for number in numbers]

    @property
    def _alive(self) -> list[str]:
        return [plan for plan in self._jobs if plan not in self.failures]

    def _take(self, part: Part, watcher: Watcher, clock: Clock) -> None:
        outcomes = self._outcomes[part.plan]
        outcomes |= part.outcomes
        self.kept.write(part.plan, part.outcomes, seconds=part.seconds)
        clock.note(len(part.outcomes), part.seconds)
        watcher.outcomes(self._jobs[part.plan], [outcomes[number] for number in sorted(outcomes)])

    def _parts(self, executor: Executor, clock: Clock) -> Iterator[Part]:
        """What comes out of all tasks; a rival has a process of its own already, and is asked here."""
        ours = [plan for plan in self._jobs if not is_rival(plan)]
        rivals = [plan for plan in self._jobs if is_rival(plan)]
        if isinstance(executor, InProcess):
            ours, rivals = [*ours, *rivals], []
        for where, plans in ((executor, ours), (InProcess(), rivals)):
            yield from where.map(self._setting, tasks(self._setting, plans, self._is_known), clock)

    def _is_known(self, plan: str, number: int) -> bool:
        return number in self._outcomes[plan]


def _record(
    setting: Setting,
    job: Job,
    collected: Collected,
    known: Mapping[Job, Record | None],
    shortcut: Mapping[str, float] | None,
) -> Record:
    """The record of a job, beside the edges on the same samples."""
    numbers = collected.samples_of(job.plan)
    if not numbers:
        raise SuiteError(
            f"{setting.n} samples were asked for; the time was up before one was finished under every plan; "
            "run the same again, it goes on, or give it more minutes"
        )
    edges = {}
    for edge in EDGES:
        record = known[edge]
        if record is None:
            edges[edge.plan] = scores_of(collected.outcomes(edge.plan, numbers))
        else:
            edges[edge.plan] = tuple(record.outcomes[number] for number in numbers)
    if job.plan in collected.failures:
        return failed(setting, job, collected.failures[job.plan], edges=edges)
    outcomes = collected.outcomes(job.plan, numbers)
    seconds = collected.kept.seconds(job.plan)
    return summarise(setting, job, outcomes, seconds=seconds, edges=edges, shortcut=shortcut)


def _finished(record: Record | None) -> Record | None:
    """A record that need not be made again; what failed, or has not all samples, is tried again."""
    return record if record is not None and record.failure is None and record.is_whole else None
