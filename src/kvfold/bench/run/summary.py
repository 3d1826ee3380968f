"""Summary: from the outcomes of all samples under one plan to its record.

Everything that a record says is put together here: means and intervals of what was measured, what the ceiling and the
floor scored on the same samples, and where it all comes from. It runs nothing and writes nothing.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.run.job import CEILING, FLOOR, Job
from kvfold.bench.run.provenance import git_revision, versions
from kvfold.bench.run.record import UNMEASURED, Record
from kvfold.bench.run.setting import Setting
from kvfold.bench.run.statistics import difference, interval, intervals
from kvfold.bench.suite import Outcome

Scores = tuple[float, ...]  # one per sample, in the order of the samples
Edges = Mapping[str, Scores]  # of the ceiling and the floor, by the keys of their means in records

_MEANS = ("stored", "resident", "attended", "ttft_seconds", "tpot_seconds")
_BYTES = ("stored_bytes", "resident_bytes", "full_bytes")


def scores_of(outcomes: Sequence[Outcome]) -> Scores:
    """List the scores of outcomes."""
    return tuple(outcome.score for outcome in outcomes)


def summarise(
    setting: Setting,
    job: Job,
    outcomes: Sequence[Outcome],
    *,
    seconds: float,
    edges: Edges,
    shortcut: Mapping[str, float] | None,
) -> Record:
    """Make the record of a plan from the outcomes of its samples, all of them or those of a run whose time was up.

    The scores of `edges` are of the same samples.
    """
    scores, families = scores_of(outcomes), _by_family(outcomes)
    full = fmean(edges[CEILING])
    claims = [outcome.claimed for outcome in outcomes if outcome.claimed is not None]
    values: dict[str, Any] = {
        "score": fmean(scores),
        "interval": interval(scores),
        "by_family": {name: fmean(each) for name, each in families.items()},
        "shortcut": None if shortcut is None else _weighted(shortcut, families),
        "shortcut_by_family": shortcut,
        "retained": min(1.0, fmean(scores) / full) if full > 0 else None,
        "outcomes": scores,
        "wall_seconds": seconds,
        "claimed": fmean(claims) if claims else None,
        "shared_prefill": all(outcome.shared_prefill for outcome in outcomes),
        "metrics": setting.suite.metrics(outcomes),
        "metric_intervals": intervals(outcomes, setting.suite.metrics),
    }
    for name in _MEANS:
        values[name] = fmean(getattr(outcome, name) for outcome in outcomes)
    for name in _BYTES:
        values[name] = round(fmean(getattr(outcome, name) for outcome in outcomes))
    fields = _run_fields(setting, job, edges)
    if len(scores) < setting.n:
        fields["remarks"] += (f"{len(scores)} of {setting.n} samples: the time was up",)
    return Record(**fields, **values)


def failed(setting: Setting, job: Job, error: Exception, *, edges: Edges) -> Record:
    """Make the record of a rival that failed: how it failed, and nothing that was measured."""
    nothing = {"shortcut": None, "shortcut_by_family": None, "retained": None, "wall_seconds": 0.0}
    return Record(**_run_fields(setting, job, edges), **UNMEASURED, **nothing, failure=str(error))


def _run_fields(setting: Setting, job: Job, edges: Edges) -> dict[str, Any]:
    """The fields of a record that describe its run, whatever came out."""
    subject = setting.subject
    rival_versions = {}
    if subject.rivals is not None and is_rival(job.plan):
        rival_versions = subject.rivals.versions(job.plan)
    return {
        **setting.sample_fields,
        **{name: fmean(scores) for name, scores in edges.items()},
        "model": subject.name,
        "device": subject.device,
        "threads": setting.threads,
        "plan": job.plan,
        "keep": job.keep,
        "query_aware": setting.suite.query_aware and job.looks_at_queries,
        "git": git_revision(),
        "versions": versions() | rival_versions,
        "remarks": _headroom(edges) if setting.suite.has_floor else (),
    }


def _headroom(edges: Edges) -> tuple[str, ...]:
    """Warn where the floor is so near to the ceiling that no plan could show anything."""
    if difference(edges[CEILING], edges[FLOOR]).low > 0:
        return ()
    full, none = fmean(edges[CEILING]), fmean(edges[FLOOR])
    return (f"no headroom: the floor ({none:.3f}) is not clearly below the ceiling ({full:.3f})",)


def _by_family(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """The scores of each family, families in the order of the samples."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.family, []).append(outcome.score)
    return found


def _weighted(by_family: Mapping[str, float], families: Mapping[str, Sequence[float]]) -> float:
    """The mean over all samples of something that is known per family."""
    total = sum(by_family[name] * len(each) for name, each in families.items())
    return total / sum(len(each) for each in families.values())
