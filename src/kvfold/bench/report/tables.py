"""Records as tables: which rows belong together, in which order, and which differences are ties.

A table holds the records of one set of samples. A method that was run in two scopes gets one row, the better; both
stay in the records. It knows nothing of how a table looks: `page.py` and `live.py` draw it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.run.record import Record
from kvfold.bench.run.statistics import Difference, difference

LOSSLESS = ("full", "full()")
FLOOR = ("none", "none()")
_SCOPE = re.compile(r"""\bscope\s*=\s*(['"])(\w+)\1\s*,?\s*""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: a record, and how it compares with the full cache and the best at its size."""

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
        """The metrics that are shown: every one of MEASURES that a record has."""
        return tuple(name for name in MEASURES if any(name in row.record.metrics for row in self.rows))

    @property
    def has_rivals(self) -> bool:
        """Whether rivals ran on the same samples."""
        return any(is_rival(row.record.plan) for row in self.rows)


def without_scope(plan: str) -> str:
    """Strip the scope from a plan's text, so that two scopes of one method share a row."""
    return re.sub(r",\s*\)", ")", _SCOPE.sub("", plan))


def is_full(record: Record) -> bool:
    """Say whether a record is the ceiling."""
    return record.plan in LOSSLESS


def is_none(record: Record) -> bool:
    """Say whether a record is the floor."""
    return record.plan in FLOOR


def better_scopes(records: Iterable[Record]) -> list[Record]:
    """Keep, of records that differ in scope alone, the one with the higher score; on a draw the smaller one."""
    best: dict[str, Record] = {}
    for record in records:
        label = without_scope(record.plan)
        other = best.get(label)
        if other is None or (record.score, -record.stored) > (other.score, -other.stored):
            best[label] = record
    return list(best.values())


def _order(record: Record) -> tuple[bool, bool, float, str]:
    if record.keep is not None:
        size = record.keep
    else:
        size = record.stored if record.failure is None else 0.0
    return not is_full(record), not is_none(record), -size, record.plan


def _standing(record: Record, others: Sequence[Record]) -> str:
    """The standing among the plans of its size. Of several equally good ones each is in a tie and none is the best."""
    if record.failure is not None:
        return "failed"
    if record.keep is None or len(others) < 2:
        return ""
    best = max(others, key=lambda other: other.score)
    if record.score == best.score:
        equals = [other for other in others if other.score == best.score]
        return "best" if len(equals) == 1 else "tie"
    lost = _paired(record, best)
    if lost is None or not lost.tie:
        return ""
    return "tie"


def _from_rival(record: Record, others: Sequence[Record]) -> Difference | None:
    """How much a plan of ours scores above the best rival of its size."""
    rivals = [other for other in others if is_rival(other.plan)]
    comparable = record.failure is None and record.keep is not None and not is_rival(record.plan)
    if not rivals or not comparable:
        return None
    best = max(rivals, key=lambda rival: rival.score)
    return _paired(record, best)


def _paired(record: Record, other: Record) -> Difference | None:
    """How much one scores above the other on the same samples; None where one was stopped earlier."""
    first, second = record.outcomes, other.outcomes
    if len(first) != len(second):
        return None
    return difference(first, second)


def _warnings(records: Sequence[Record]) -> tuple[str, ...]:
    """Warnings for the reader of a table."""
    first = records[0]
    found = list(first.remarks)
    if first.shortcut is not None and first.full <= first.shortcut:
        found.append(f"the full cache ({first.full:.3f}) is not above the best shortcut ({first.shortcut:.3f})")
    for record in records:
        if record.keep is not None and record.stored > record.keep + 0.05:
            found.append(f"{record.plan} promises to keep {record.keep:.2f} and stores {record.stored:.3f}")
    return tuple(found)


def table(records: Sequence[Record]) -> Table:
    """Make one table of records that share their samples."""
    assert len({record.samples for record in records}) == 1, "a table compares on the same samples only"
    shown = sorted(better_scopes(records), key=_order)
    full = next((record for record in shown if is_full(record)), None)
    rows = []
    for record in shown:
        others = [other for other in shown if other.keep == record.keep and other.failure is None]
        lost = None
        if full is not None and record is not full and record.failure is None:
            lost = _paired(record, full)
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
    counts = [len(record.outcomes) for record in shown if record.failure is None]
    fewest = min(counts, default=one.n)
    count = f"{one.n}" if fewest == one.n else f"{fewest} of {one.n}"
    run = f"{one.dtype}, {count} samples, seed {one.seed}"
    return Table(
        title=f"{one.suite} {one.suite_version} on {one.model} ({run})",
        rows=tuple(rows),
        families=tuple(one.by_family),
        warnings=_warnings(shown),
    )


def tables(records: Iterable[Record]) -> list[Table]:
    """Group records by their samples, in the order in which the groups first appear."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.samples, []).append(record)
    return [table(group) for group in groups.values()]


HEADS = ("plan", "kept", "removed", "resident", "attended", "score", "interval", "against full")
AGAINST_RIVAL = "against best rival"
MEASURES = (
    "kl",
    "perplexity_ratio",
    "value_log_likelihood",
    "exact",
    "log_likelihood",
    "reuse",
)  # metrics with a column


def heads(shown: Table) -> tuple[str, ...]:
    """List the head of every column; metrics, then families, come last."""
    return (*HEADS, *([AGAINST_RIVAL] if shown.has_rivals else []), *shown.measures, *shown.families)


def cells(shown: Table, row: Row) -> tuple[str, ...]:
    """Write the cells of one row of a table, under its heads."""
    record = row.record
    if record.failure is not None:
        failed = f"failed ({record.failure.partition(':')[0]})"
        empty = [""] * len(heads(shown)[6:])  # columns after the score
        return (record.plan, "", "", "", "", failed, *empty)
    claims = "" if record.claimed is None else f" (claims {record.claimed:.3f})"
    digits = shown.digits
    mark = {"best": " (best)", "tie": " (tie)", "": ""}[row.standing]
    low, high = record.interval
    rival = [_gap(row.against_rival, digits)] if shown.has_rivals else []
    measures = [_measure(record, name) for name in shown.measures]
    families = [f"{score:.{digits}f}" for score in record.by_family.values()]
    return (
        record.plan,
        f"{record.stored:.3f}{claims}",
        f"{1 - record.stored:.3f}",
        f"{record.resident:.3f}",
        f"{record.attended:.3f}",
        f"{record.score:.{digits}f}{mark}",
        f"{low:.{digits}f} to {high:.{digits}f}",
        _gap(row.against_full, digits),
        *rival,
        *measures,
        *families,
    )


def _measure(record: Record, name: str) -> str:
    if name not in record.metrics:
        return ""
    bounds = record.metric_intervals.get(name)
    interval = ""
    if bounds is not None:
        low, high = bounds
        interval = f" ({low:.3g} to {high:.3g})"
    return f"{record.metrics[name]:.4g}{interval}"


def _gap(gap: Difference | None, digits: int) -> str:
    if gap is None:
        return ""
    if gap.tie:
        return "tie"
    return f"{gap.mean:+.{digits}f} ({gap.low:+.{digits}f} to {gap.high:+.{digits}f})"


def notes(shown: Table) -> list[str]:
    """Write the lines under a table: the shortcut, whether questions were seen, failures, and warnings."""
    one = shown.rows[0].record
    aware = [row.label for row in shown.rows if row.record.query_aware]
    lines = [f"{label} saw the question before it folded" for label in aware]
    if not aware:
        lines.append("no plan saw the question before it folded")
    lines += scopes_shown(row.record.plan for row in shown.rows)
    if one.shortcut is not None:
        by_family = one.shortcut_by_family or {}
        each = ", ".join(f"{name} {score:.3f}" for name, score in by_family.items())
        lines.append(
            f"best guess that does not know which value belongs to whom, same samples: {one.shortcut:.3f} ({each})"
        )
    for row in shown.rows:
        if row.record.failure is not None:
            lines.append(f"{row.label} failed: {row.record.failure}")
    for warning in shown.warnings:
        lines.append(f"warning: {warning}")
    return lines


def scopes_shown(plans: Iterable[str]) -> list[str]:
    """Write the scope of the plans whose text names one: of two that ran, the better has the row."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        scope = _SCOPE.search(plan)
        if scope is not None:
            found.setdefault(scope.group(2), []).append(without_scope(plan))
    return [f"shown in scope {scope!r}: {', '.join(found[scope])}" for scope in sorted(found)]


_IN_MARKDOWN = {
    "|": "\\|",
    "<": "&lt;",
}


def markdown_line(words: Sequence[str]) -> str:
    """Write one line of a Markdown table. A bar in a word ends no cell, and a control character is written out."""
    return "| " + " | ".join(in_markdown(word) for word in words) + " |"


def in_markdown(text: str) -> str:
    """Escape what would end a cell, begin a tag, or act on a terminal."""
    shown = ""
    for character in text:
        if not character.isprintable():
            character = repr(character)[1:-1]
        shown += _IN_MARKDOWN.get(character, character)
    return shown


def markdown(shown: Table) -> str:
    """Write a table as Markdown: title, heads, rows, notes."""
    columns = heads(shown)
    lines = [f"**{shown.title}**", "", markdown_line(columns), "|" + "---|" * len(columns)]
    for row in shown.rows:
        plan, *rest = cells(shown, row)
        lines.append(markdown_line([f"`{plan}`", *rest]))
    lines.append("")
    for note in notes(shown):
        lines.append(f"- {in_markdown(note)}")
    return "\n".join(lines) + "\n"
