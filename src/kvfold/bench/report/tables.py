"""Records as tables: which rows belong together, in which order, and which differences are ties.

A table holds the records of one set of samples. A method that was run in two scopes gets one row, the better; both
stay in the records. It knows nothing of how a table looks: `report.py` and `live.py` draw it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.run.record import Record
from kvfold.bench.run.statistics import Difference, difference

LOSSLESS = ("full", "full()")
FLOOR = ("none", "none()")
_SCOPE = re.compile(r"""\bscope\s*=\s*(['"])\w+\1\s*,?\s*""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: a record, and how it stands beside the full cache and the best at its size."""

    record: Record
    label: str  # the plan, scope apart
    against_full: Difference | None  # None for `full` itself, and where `full` was not run
    against_rival: Difference | None  # from the best rival of the same keep; None for rivals, and where none ran
    standing: str  # among the plans of the same keep: "best", "tie" with the best, or ""; "failed" for a rival that did


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of one set of samples: the ceiling, then the floor, then the plans, most kept first."""

    title: str
    rows: tuple[Row, ...]
    families: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def digits(self) -> int:
        """How many digits of a score are shown: more where even the ceiling is small, as likelihoods are."""
        return 3 if self.rows[0].record.full >= 0.1 else 5

    @property
    def measures(self) -> tuple[str, ...]:
        """What else is shown: every one of MEASURES that some record has."""
        return tuple(name for name in MEASURES if any(name in row.record.metrics for row in self.rows))

    @property
    def has_rivals(self) -> bool:
        """Whether other people's caches were asked the same."""
        return any(is_rival(row.record.plan) for row in self.rows)


def without_scope(plan: str) -> str:
    """A plan's text without its scope, so that two scopes of one method share a row."""
    return re.sub(r",\s*\)", ")", _SCOPE.sub("", plan))


def is_full(record: Record) -> bool:
    """Is it the ceiling?"""
    return record.plan in LOSSLESS


def is_none(record: Record) -> bool:
    """Is it the floor?"""
    return record.plan in FLOOR


def better_scopes(records: Iterable[Record]) -> list[Record]:
    """Of the records that differ in their scope alone, the one with the higher score; on a draw the smaller one."""
    best: dict[str, Record] = {}
    for record in records:
        label = without_scope(record.plan)
        other = best.get(label)
        if other is None or (record.score, -record.stored) > (other.score, -other.stored):
            best[label] = record
    return list(best.values())


def _order(record: Record) -> tuple[bool, bool, float, str]:
    keep = record.keep if record.keep is not None else record.stored if record.failure is None else 0.0
    return not is_full(record), not is_none(record), -keep, record.plan


def _standing(record: Record, others: Sequence[Record]) -> str:
    """Beside the others of its size. Where several are equally good, each is in a tie and none is the best."""
    if record.failure is not None:
        return "failed"
    if record.keep is None or len(others) < 2:
        return ""
    best = max(others, key=lambda other: other.score)
    if record.score == best.score:
        return "best" if sum(other.score == best.score for other in others) == 1 else "tie"
    return "tie" if difference(record.outcomes, best.outcomes).tie else ""


def _from_rival(record: Record, others: Sequence[Record]) -> Difference | None:
    """How a plan of ours stands beside the best rival of its size."""
    rivals = [other for other in others if is_rival(other.plan)]
    if record.failure is not None or record.keep is None or is_rival(record.plan) or not rivals:
        return None
    return difference(record.outcomes, max(rivals, key=lambda rival: rival.score).outcomes)


def _warnings(records: Sequence[Record]) -> tuple[str, ...]:
    """What a reader must know before believing the table."""
    first = records[0]
    found = list(first.remarks)
    if first.shortcut is not None and first.full <= first.shortcut:
        found.append(f"the full cache ({first.full:.3f}) is not above the best shortcut ({first.shortcut:.3f})")
    found += [
        f"{record.plan} promises to keep {record.keep:.2f} and stores {record.stored:.3f}"
        for record in records
        if record.keep is not None and record.stored > record.keep + 0.05
    ]
    return tuple(found)


def table(records: Sequence[Record]) -> Table:
    """Make one table of records that share their samples."""
    assert len({record.samples for record in records}) == 1, "a table compares on the same samples only"
    shown = sorted(better_scopes(records), key=_order)
    full = next((record for record in shown if is_full(record)), None)
    rows = []
    for record in shown:
        others = [other for other in shown if other.keep == record.keep and other.failure is None]
        lost = None if full in (None, record) or record.failure else difference(record.outcomes, full.outcomes)
        rows.append(
            Row(
                record=record,
                label=without_scope(record.plan),
                against_full=lost,
                against_rival=_from_rival(record, others),
                standing=_standing(record, others),
            )
        )
    one = shown[0]
    title = f"{one.suite} {one.suite_version} on {one.model} ({one.dtype}, {one.n} samples, seed {one.seed})"
    return Table(title=title, rows=tuple(rows), families=tuple(one.by_family), warnings=_warnings(shown))


def tables(records: Iterable[Record]) -> list[Table]:
    """Group records by their samples, in the order in which the groups first appear."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.samples, []).append(record)
    return [table(group) for group in groups.values()]


HEADS = ("plan", "kept", "removed", "resident", "attended", "score", "interval", "against full")
AGAINST_RIVAL = "against best rival"
MEASURES = ("kl", "perplexity_ratio", "value_log_likelihood", "exact", "log_likelihood", "reuse")  # shown where known


def heads(shown: Table) -> tuple[str, ...]:
    """The head of every column; what else was measured, then the families, come last."""
    return (*HEADS, *([AGAINST_RIVAL] if shown.has_rivals else []), *shown.measures, *shown.families)


def cells(shown: Table, row: Row) -> tuple[str, ...]:
    """The words of one row of a table, under its heads."""
    record = row.record
    if record.failure is not None:
        failed = f"failed ({record.failure.partition(':')[0]})"
        return (record.plan, "", "", "", "", failed, *("" for _ in heads(shown)[6:]))
    claims = "" if record.claimed is None else f" (claims {record.claimed:.3f})"
    digits = shown.digits
    mark = {"best": " (best)", "tie": " (tie)", "": ""}[row.standing]
    return (
        record.plan,
        f"{record.stored:.3f}{claims}",
        f"{1 - record.stored:.3f}",
        f"{record.resident:.3f}",
        f"{record.attended:.3f}",
        f"{record.score:.{digits}f}{mark}",
        f"{record.interval[0]:.{digits}f} to {record.interval[1]:.{digits}f}",
        _gap(row.against_full, digits),
        *([_gap(row.against_rival, digits)] if shown.has_rivals else []),
        *(_measure(record, name) for name in shown.measures),
        *(f"{score:.{digits}f}" for score in record.by_family.values()),
    )


def _measure(record: Record, name: str) -> str:
    if name not in record.metrics:
        return ""
    bounds = record.metric_intervals.get(name)
    interval = "" if bounds is None else f" ({bounds[0]:.3g} to {bounds[1]:.3g})"
    return f"{record.metrics[name]:.4g}{interval}"


def _gap(gap: Difference | None, digits: int) -> str:
    if gap is None:
        return ""
    return "tie" if gap.tie else f"{gap.mean:+.{digits}f} ({gap.low:+.{digits}f} to {gap.high:+.{digits}f})"


def notes(shown: Table) -> list[str]:
    """What stands under a table: the shortcut, whether questions were seen, and warnings."""
    one = shown.rows[0].record
    lines = ["no plan saw the question before it folded" if not any(r.record.query_aware for r in shown.rows) else ""]
    lines += [f"{row.label} saw the question before it folded" for row in shown.rows if row.record.query_aware]
    if one.shortcut is not None:
        each = ", ".join(f"{name} {score:.3f}" for name, score in (one.shortcut_by_family or {}).items())
        lines.append(f"best shortcut without memory of bindings, same samples: {one.shortcut:.3f} ({each})")
    lines += [f"{row.label} failed: {row.record.failure}" for row in shown.rows if row.record.failure is not None]
    lines += [f"warning: {warning}" for warning in shown.warnings]
    return [line for line in lines if line]


def markdown(shown: Table) -> str:
    """A table for a README: title, head, rows, notes."""
    lines = [f"**{shown.title}**", "", "| " + " | ".join(heads(shown)) + " |", "|" + "---|" * len(heads(shown))]
    for row in shown.rows:
        plan, *rest = cells(shown, row)
        lines.append("| " + " | ".join([f"`{plan}`", *rest]) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(shown))]) + "\n"
