"""A suite, a model and plans in; records out, each on the disk before the next plan starts.

The ceiling and the floor always run, and first: no score means anything without them. What a folder already holds
is not run again. How progress looks is the watcher's business (`live.py`), where work is done the executor's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol, runtime_checkable

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.peers.process import PeerError
from kvfold.bench.run.executor import Executor, InProcess
from kvfold.bench.run.job import EDGES, Job, with_edges
from kvfold.bench.run.journal import Journal
from kvfold.bench.run.pace import OutOfTime, Pace
from kvfold.bench.run.record import Record
from kvfold.bench.run.setting import Setting
from kvfold.bench.run.summary import failed, scores_of, summarise
from kvfold.bench.suite import Outcome


@runtime_checkable
class Watcher(Protocol):
    """Hears what happens while it happens."""

    def begin(self, job: Job, n: int, prediction: str) -> None: ...
    def outcomes(self, job: Job, so_far: Sequence[Outcome]) -> None: ...
    def finish(self, job: Job, record: Record) -> None: ...


def run(
    setting: Setting,
    jobs: Sequence[Job],
    *,
    folder: Path,
    executor: Executor,
    watcher: Watcher,
    pace: Pace | None = None,
) -> list[Record]:
    """Run every job that the folder does not hold yet; return the records of all, the ceiling and the floor first.

    Of a run that is out of time these are the records that are finished.
    """
    journal = Journal(folder)
    known = {job: _finished(journal.find(setting.work(job.plan))) for job in with_edges(jobs)}
    pace = Pace() if pace is None else pace
    missing = sum(record is None for record in known.values())
    pace.begin(setting.n * missing, missing)
    records: list[Record] = []
    try:
        for record in _records(setting, known, _Way(journal, executor, watcher, pace)):
            records.append(record)
    except OutOfTime:
        pace.stop(len(known) - len(records))
    return records


@dataclass(frozen=True, slots=True)
class _Way:
    """How the jobs of one run are carried out."""

    journal: Journal
    executor: Executor
    watcher: Watcher
    pace: Pace


def _records(setting: Setting, known: Mapping[Job, Record | None], way: _Way) -> Iterator[Record]:
    """Yield the record of each job, made or found."""
    shortcut = setting.suite.shortcut(setting.samples)
    # An edge's record carries the score of the other edge, so both are measured before either is written.
    fresh = {job: _measure(setting, job, way) for job in EDGES if known[job] is None}
    edges = {}
    for job in EDGES:
        record = known[job]
        edges[job.plan] = scores_of(fresh[job][0]) if record is None else record.outcomes
    for job, record in known.items():
        if record is None:
            try:
                outcomes, seconds = fresh.get(job) or _measure(setting, job, way)
                record = summarise(setting, job, outcomes, seconds=seconds, edges=edges, shortcut=shortcut)
            except PeerError as error:
                record = failed(setting, job, error, edges=edges)
            way.journal.write(record)
        way.watcher.finish(job, record)
        yield record


def _finished(record: Record | None) -> Record | None:
    """A record that need not be made again; what failed is tried again."""
    return record if record is not None and record.failure is None else None


def _measure(setting: Setting, job: Job, way: _Way) -> tuple[list[Outcome], float]:
    """The outcomes of every sample under one plan, and the seconds that they took together."""
    rival = is_rival(job.plan)
    where = InProcess() if rival else way.executor  # a rival has a process of its own already
    way.watcher.begin(job, setting.n, "" if rival else setting.suite.prediction(setting.subject, job.plan))
    outcomes: list[Outcome] = []
    start = perf_counter()
    for batch in where.map(setting, job.plan, setting.batches):
        outcomes += batch
        way.watcher.outcomes(job, outcomes)
        way.pace.count(len(batch))
    assert len(outcomes) == setting.n, "a suite owes one outcome per sample"
    return outcomes, perf_counter() - start
