"""A suite, a model and plans in; records out, each on the disk before the next plan starts.

The ceiling and the floor always run, and first: no score means anything without them. What a folder already holds
is not run again. How progress looks is the watcher's business (`live.py`), where work is done the executor's.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Protocol, runtime_checkable

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.peers.process import PeerError
from kvfold.bench.run.executor import Executor, InProcess
from kvfold.bench.run.job import EDGES, Job, with_edges
from kvfold.bench.run.journal import Journal
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


def run(setting: Setting, jobs: Sequence[Job], *, folder: Path, executor: Executor, watcher: Watcher) -> list[Record]:
    """Run every job that the folder does not hold yet; return the records of all, the ceiling and the floor first."""
    journal = Journal(folder)
    shortcut = setting.suite.shortcut(setting.samples)
    known = {job: _finished(journal.find(setting.work(job.plan))) for job in with_edges(jobs)}
    # An edge's record carries the score of the other edge, so both are measured before either is written.
    fresh = {job: _measure(setting, job, executor, watcher) for job in EDGES if known[job] is None}
    edges = {}
    for job in EDGES:
        record = known[job]
        edges[job.plan] = scores_of(fresh[job][0]) if record is None else record.outcomes
    records = []
    for job, record in known.items():
        if record is None:
            try:
                outcomes, seconds = fresh.get(job) or _measure(setting, job, executor, watcher)
                record = summarise(setting, job, outcomes, seconds=seconds, edges=edges, shortcut=shortcut)
            except PeerError as error:
                record = failed(setting, job, error, edges=edges)
            journal.write(record)
        watcher.finish(job, record)
        records.append(record)
    return records


def _finished(record: Record | None) -> Record | None:
    """A record that need not be made again; what failed is tried again."""
    return record if record is not None and record.failure is None else None


def _measure(setting: Setting, job: Job, executor: Executor, watcher: Watcher) -> tuple[list[Outcome], float]:
    """The outcomes of every sample under one plan, and the seconds that they took together."""
    rival = is_rival(job.plan)
    where = InProcess() if rival else executor  # a rival has a process of its own already
    watcher.begin(job, setting.n, "" if rival else setting.suite.prediction(setting.subject, job.plan))
    outcomes: list[Outcome] = []
    start = perf_counter()
    for batch in where.map(setting, job.plan, setting.batches):
        outcomes += batch
        watcher.outcomes(job, outcomes)
    assert len(outcomes) == setting.n, "a suite owes one outcome per sample"
    return outcomes, perf_counter() - start
