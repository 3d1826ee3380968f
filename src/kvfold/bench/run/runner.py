"""A suite, a model and plans in; records out, each on the disk before the next plan starts.

The ceiling and the floor always run, and first: no score means anything without them. What a folder already holds
is not run again. How progress looks is the watcher's business (`live.py`), where work is done the executor's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.peers.process import PeerError
from kvfold.bench.run.executor import Executor, InProcess
from kvfold.bench.run.journal import Journal
from kvfold.bench.run.provenance import git_revision, versions
from kvfold.bench.run.record import MEASURED, Record
from kvfold.bench.run.setting import Setting
from kvfold.bench.run.statistics import difference, interval, intervals
from kvfold.bench.suite import Outcome

CEILING, FLOOR = "full", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One plan to run: its text, the fraction that it promises to keep, and whether queries tell it what to keep."""

    plan: str
    keep: float | None
    looks_at_queries: bool = False


EDGES = (Job(plan=CEILING, keep=None), Job(plan=FLOOR, keep=None))


@runtime_checkable
class Watcher(Protocol):
    """Told what happens while it happens."""

    def begin(self, job: Job, n: int, foretold: str) -> None: ...
    def outcomes(self, job: Job, so_far: Sequence[Outcome]) -> None: ...
    def finish(self, job: Job, record: Record) -> None: ...


def with_edges(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with the ceiling and the floor in front, each job once."""
    return list(dict.fromkeys([*EDGES, *jobs]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one plan did on every sample, before it is a record."""

    outcomes: Sequence[Outcome]
    seconds: float

    @property
    def scores(self) -> tuple[float, ...]:
        """One score per sample."""
        return tuple(outcome.score for outcome in self.outcomes)

    def mean(self, name: str) -> float:
        """The mean of one field of the outcomes."""
        return fmean(getattr(outcome, name) for outcome in self.outcomes)

    def families(self) -> dict[str, list[float]]:
        """The scores of each family, families in the order of the samples."""
        found: dict[str, list[float]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.family, []).append(outcome.score)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """What the ceiling and the floor scored, sample by sample."""

    full: tuple[float, ...]
    none: tuple[float, ...]

    @property
    def scores(self) -> dict[str, float]:
        """Both means, by their keys in records."""
        return {"full": fmean(self.full), "none": fmean(self.none)}

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether there is room between them in which a plan could show anything."""
        if not difference(self.full, self.none).low <= 0:
            return ()
        return (
            "no headroom: the floor ({none:.3f}) is not clearly below the ceiling ({full:.3f})".format(**self.scores),
        )


def run(setting: Setting, jobs: Sequence[Job], *, folder: Path, executor: Executor, watcher: Watcher) -> list[Record]:
    """Run every job that the folder does not hold yet; return the records of all, the edges first."""
    journal = Journal(folder)
    shortcut = setting.suite.shortcut(setting.samples)
    known = {job: _finished(journal.find(setting.work(job.plan))) for job in with_edges(jobs)}
    # An edge's record carries the score of the other edge, so both are measured before either is written.
    fresh = {job: _measure(setting, job, executor, watcher) for job in EDGES if known[job] is None}
    full, none = (record.outcomes if (record := known[job]) else fresh[job].scores for job in EDGES)
    edges = Edges(full=full, none=none)
    records = []
    for job, record in known.items():
        if record is None:
            try:
                measured = fresh.get(job) or _measure(setting, job, executor, watcher)
                record = _record(setting, job, measured, edges=edges, shortcut=shortcut)
            except PeerError as error:
                record = _failed(setting, job, error, edges=edges)
            journal.write(record)
        watcher.finish(job, record)
        records.append(record)
    return records


def _finished(record: Record | None) -> Record | None:
    """A record that need not be made again; what failed is tried again."""
    return record if record is not None and record.failure is None else None


def _measure(setting: Setting, job: Job, executor: Executor, watcher: Watcher) -> Measured:
    outcomes: list[Outcome] = []
    where = InProcess() if is_rival(job.plan) else executor  # a rival has a process of its own already
    foretold = "" if is_rival(job.plan) else setting.suite.foretold(setting.subject, job.plan)
    watcher.begin(job, setting.n, foretold)
    start = perf_counter()
    for some in where.map(setting, job.plan, setting.spans):
        outcomes += some
        watcher.outcomes(job, outcomes)
    assert len(outcomes) == setting.n, "a suite owes one outcome per sample"
    return Measured(outcomes=outcomes, seconds=perf_counter() - start)


def _record(
    setting: Setting,
    job: Job,
    measured: Measured,
    *,
    edges: Edges,
    shortcut: Mapping[str, float] | None,
) -> Record:
    families, scores, full = measured.families(), measured.scores, edges.scores["full"]
    claims = [outcome.claimed for outcome in measured.outcomes if outcome.claimed is not None]
    fractions = ("stored", "resident", "attended", "ttft_seconds", "tpot_seconds")
    sizes = ("stored_bytes", "resident_bytes", "full_bytes")
    values: dict[str, Any] = {
        "score": fmean(scores),
        "interval": interval(scores),
        "by_family": {name: fmean(each) for name, each in families.items()},
        "shortcut": None if shortcut is None else _overall(shortcut, families),
        "shortcut_by_family": shortcut,
        "retained": min(1.0, fmean(scores) / full) if full > 0 else None,
        "outcomes": scores,
        "wall_seconds": measured.seconds,
        "claimed": fmean(claims) if claims else None,
        "metrics": setting.suite.metrics(measured.outcomes),
        "metric_intervals": intervals(measured.outcomes, setting.suite.metrics),
    }
    values |= {name: measured.mean(name) for name in fractions}
    values |= {name: round(measured.mean(name)) for name in sizes}
    return Record(**_told(setting, job, edges), **values)


def _failed(setting: Setting, job: Job, error: PeerError, *, edges: Edges) -> Record:
    """A row that says how a rival failed."""
    nothing = {"shortcut": None, "shortcut_by_family": None, "retained": None, "wall_seconds": 0.0}
    return Record(**_told(setting, job, edges), **MEASURED, **nothing, failure=str(error))


def _told(setting: Setting, job: Job, edges: Edges) -> dict[str, Any]:
    """What a record says of its run, whatever came out."""
    rivals = setting.subject.rivals
    return (
        setting.asked
        | edges.scores
        | {
            "model": setting.subject.name,
            "device": setting.subject.device,
            "threads": setting.threads,
            "plan": job.plan,
            "keep": job.keep,
            "query_aware": setting.suite.query_aware and job.looks_at_queries,
            "git": git_revision(),
            "versions": versions() | (rivals.versions(job.plan) if rivals is not None and is_rival(job.plan) else {}),
            "remarks": edges.remarks if setting.suite.has_floor else (),
        }
    )


def _overall(by_family: Mapping[str, float], families: Mapping[str, Sequence[float]]) -> float:
    """The score over all samples of something known per family."""
    return sum(by_family[name] * len(each) for name, each in families.items()) / sum(map(len, families.values()))
