"""One result: what one plan scored on one suite with one model, and everything needed to judge that number.

A record is one line of JSON: the fields below, in this order, then a key for each metric of the suite, and their
intervals together. It carries the outcome of every sample, so that two records on the same samples can be compared in
pairs later. This file knows the shape of a record and nothing of how it came about, of files (`journal.py`) or of
tables (`tables.py`).
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kvfold.errors import FileError, in_one_line
from kvfold.schema import first_fault


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The result of one plan: what ran, its score, its sizes and its times. Fractions are of the full cache."""

    suite: str
    suite_version: int
    settings: Mapping[str, Any]  # what shapes the suite's samples: turns, families, split
    model: str
    fingerprint: str
    dtype: str
    device: str
    threads: int
    plan: str  # its text
    keep: float | None  # nominal; None where the plan has none
    query_aware: bool  # did the method see the question before it folded
    seed: int
    n: int
    score: float
    interval: tuple[float, float]  # 95 %, bootstrap over samples
    by_family: Mapping[str, float]
    full: float  # the ceiling, on the same samples
    none: float  # the floor, on the same samples
    shortcut: float | None  # the best answer without memory of bindings, on the same samples
    shortcut_by_family: Mapping[str, float] | None
    retained: float | None  # score / full, at most 1; None where full is 0
    stored: float
    resident: float
    attended: float
    stored_bytes: int
    resident_bytes: int
    full_bytes: int
    outcomes: tuple[float, ...]  # one score per sample, in the order of the samples
    ttft_seconds: float
    tpot_seconds: float
    wall_seconds: float
    git: str | None
    versions: Mapping[str, str]
    claimed: float | None = None  # the kept fraction that a rival reports; `stored` is what it really stores
    failure: str | None = None  # how it failed: kind and one line; what would have been measured is then null
    remarks: tuple[str, ...] = ()  # what a reader must know before believing the score
    shared_prefill: bool = False  # the text was read once for several plans; a key of the line where it is true
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)  # each is a key of the line
    metric_intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # like `interval`

    @property
    def is_whole(self) -> bool:
        """Whether every sample was asked; a run whose time was up has fewer."""
        return len(self.outcomes) == self.n

    @property
    def samples(self) -> str:
        """Name the samples: records with the same name were asked the same questions of the same model."""
        fields = {name: getattr(self, name) for name in SAMPLE_KEYS}
        return samples_name(device=self.device, threads=self.threads, **fields)

    @property
    def work(self) -> str:
        """Name the work: a record with this name need not be made again."""
        return work_name(self.samples, self.plan)

    def line(self) -> str:
        """Write the record as one line of JSON, without a line break."""
        assert not set(self.metrics) & set(KEYS), "a metric has a key that no field has"
        values = {name: getattr(self, name) for name in KEYS} | dict(self.metrics)
        values |= {"shared_prefill": True} if self.shared_prefill else {}
        values |= {"metric_intervals": dict(self.metric_intervals)} if self.metric_intervals else {}
        values |= {name: None for name in UNMEASURED if self.failure is not None}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)


TIMED = ("speed", "far")  # suites whose numbers depend on the device and its threads
SAMPLE_KEYS = ("suite", "suite_version", "settings", "fingerprint", "dtype", "seed", "n")
_APART = ("metrics", "metric_intervals", "shared_prefill")  # not in every line: lines of older versions lack the last
KEYS = tuple(field.name for field in dataclasses.fields(Record) if field.name not in _APART)

_FRACTIONS = ("score", "stored", "resident", "attended", "ttft_seconds", "tpot_seconds")
_SIZES = ("stored_bytes", "resident_bytes", "full_bytes")
# What a failed run has not measured, as it stands in memory; in the file it is null.
UNMEASURED: dict[str, Any] = {
    "interval": (math.nan, math.nan),
    "by_family": {},
    "outcomes": (),
    **dict.fromkeys(_FRACTIONS, math.nan),
    **dict.fromkeys(_SIZES, 0),
}


_FIELDS = TypeAdapter(Record)


def samples_name(*, device: str, threads: int, **fields: Any) -> str:
    """Name samples before any record of them exists; the other keywords are those of SAMPLE_KEYS."""
    assert set(fields) == set(SAMPLE_KEYS)
    where = [device, threads] if fields["suite"] in TIMED else []
    return json.dumps([*(fields[name] for name in SAMPLE_KEYS), *where], sort_keys=True)


def work_name(samples: str, plan: str) -> str:
    """Name the work of a record before it exists."""
    return json.dumps([samples, plan])


def from_line(line: str, *, where: str) -> Record:
    """Read one line back. `where` is how an error calls the line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{where} was read as a record; it is not JSON ({in_one_line(error, 200)}); remove the line or "
            "give another folder"
        ) from None
    given = values if isinstance(values, dict) else {}
    intervals = given.pop("metric_intervals", {})
    shared = given.pop("shared_prefill", False) is True
    metrics = {name: value for name, value in given.items() if name not in KEYS and type(value) in (int, float)}
    if set(given) - set(metrics) != set(KEYS):
        odd = ", ".join(sorted((set(given) - set(metrics)) ^ set(KEYS))[:4])
        raise FileError(
            f"{where} was read as a record; its keys differ in {odd}; it was written by another version of kvfold, "
            "run the benchmark again into a new folder"
        )
    if values["failure"] is not None:
        values |= UNMEASURED
    fields = {name: values[name] for name in KEYS}
    more = {"shared_prefill": shared, "metrics": metrics, "metric_intervals": intervals}
    return _checked({**fields, **more}, where)


def _checked(fields: dict[str, Any], where: str) -> Record:
    """Make a record of the fields of a line. Raises FileError where one has a value of another kind."""
    try:
        return _FIELDS.validate_json(json.dumps(fields), strict=True)  # as JSON: strict, lists are no tuples otherwise
    except ValidationError as error:
        raise FileError(
            f"{where} was read as a record; it has a broken field ({first_fault(error)}); remove the line or give "
            "another folder"
        ) from None
