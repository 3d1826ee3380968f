"""Records as tables: which rows belong together, in which order, and which differences are ties.

A table holds the records of one set of samples. A method that was run in two scopes gets one row, the better; both
stay in the records. It knows nothing of how a table looks: `page.py` and `live.py` draw it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.report.titles import differing, title
from kvfold.bench.run.record import Record
from kvfold.bench.run.statistics import Difference, difference

LOSSLESS = ("full", "full()")
FLOOR = ("none", "none()")
ALIKE = 0.85  # two plans hold about as many bytes where one holds at least this part of the other
_SCOPE = re.compile(r"""\bscope\s*=\s*(['"])(\w+)\1\s*,?\s*""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: a record, and how it compares with the full cache and the best at its size."""

    record: Record
    label: str  # the plan, scope apart
    against_full: Difference | None  # None for `full` itself, and where `full` was not run
    against_rival: Difference | None  # from the best rival of the same keep; None for rivals, and where none ran
    standing: str  # among plans of about as many bytes: "best", "tie" with it, or ""; "failed" for a rival that did


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of one set of samples: ceiling, floor, then the plans, most kept first; what failed comes last."""

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


def _order(record: Record) -> tuple[bool, bool, float, float, str]:
    if record.failure is not None:
        return True, True, 0.0, -(record.keep or 0.0), record.plan
    stored = round(record.stored, 3)  # as it is shown; of what looks equal the better comes first
    return not is_full(record), not is_none(record), -stored, -record.score, record.plan


def _near(record: Record, shown: Sequence[Record]) -> list[Record]:
    """The plans that hold about as many bytes as one, with itself. Whoever is near to one has it near, too."""
    found = []
    for other in shown:
        if other.failure is not None or is_full(other) or is_none(other):
            continue
        less, more = sorted((record.stored, other.stored))
        if less >= ALIKE * more:
            found.append(other)
    return found


def _standing(record: Record, shown: Sequence[Record]) -> str:
    """The standing among the plans of its size. Of several equally good ones each is in a tie and none is the best."""
    if record.failure is not None:
        return "failed"
    near = _near(record, shown)
    is_edge = is_full(record) or is_none(record)
    if is_edge or len(near) < 2 or _is_no_better_than_nothing(record):
        return ""
    best = max(near, key=lambda other: other.score)
    if record.score == best.score:
        equals = [other for other in near if other.score == best.score]
        return "best" if len(equals) == 1 else "tie"
    lost = _paired(record, best)
    if lost is None or not lost.tie:
        return ""
    return "tie"


def _is_no_better_than_nothing(record: Record) -> bool:
    """Whether a model without history, where that is below the ceiling, scores as much."""
    return record.none < record.full and record.score <= record.none


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


def table(records: Sequence[Record], *, also: Iterable[str] = ()) -> Table:
    """Make one table of records that share their samples; its title says these settings, too."""
    assert len({record.samples for record in records}) == 1, "a table compares on the same samples only"
    shown = sorted(better_scopes(records), key=_order)
    full = next((record for record in shown if is_full(record)), None)
    rows = []
    for record in shown:
        of_keep = [other for other in shown if other.keep == record.keep and other.failure is None]
        lost = None
        if full is not None and record is not full and record.failure is None:
            lost = _paired(record, full)
        rows.append(
            Row(
                record=record,
                label=without_scope(record.plan),
                against_full=lost,
                against_rival=_from_rival(record, of_keep),
                standing=_standing(record, shown),
            )
        )
    one = shown[0]
    counts = [len(record.outcomes) for record in shown if record.failure is None]
    return Table(
        title=title(one, fewest=min(counts, default=one.n), also=also),
        rows=tuple(rows),
        families=tuple(one.by_family),
        warnings=_warnings(shown),
    )


def tables(records: Iterable[Record]) -> list[Table]:
    """Group records by their samples, in the order in which the groups first appear."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.samples, []).append(record)
    every = [record for group in groups.values() for record in group]
    also = differing(every)
    return [table(group, also=also[group[0].suite, group[0].model]) for group in groups.values()]


HEADS = ("plan", "kept", "resident", "attended", "score", "interval", "against full")
AGAINST_RIVAL = "against best rival"
MEASURES = (
    "kl",
    "perplexity_ratio",
    "value_log_likelihood",
    "exact",
    "log_likelihood",
    "reuse",
    "speedup_over_stock",
    "fold_over_prefill",
    "attention_speedup",
)  # metrics with a column


def heads(shown: Table) -> tuple[str, ...]:
    """List the head of every column; metrics, then families, come last."""
    return (*HEADS, *([AGAINST_RIVAL] if shown.has_rivals else []), *shown.measures, *shown.families)


def cells(shown: Table, row: Row) -> tuple[str, ...]:
    """Write the cells of one row of a table, under its heads."""
    record = row.record
    if record.failure is not None:
        failed = f"failed ({record.failure.partition(':')[0]})"
        empty = [""] * len(heads(shown)[5:])  # columns after the score
        return (record.plan, "", "", "", failed, *empty)
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


UNSEEN = "no plan saw the question before it folded"


def seen_above(shown: Iterable[Table]) -> str:
    """Say once, above several tables, which plans saw the question: none, or those that are named under a table."""
    saw = any(row.record.query_aware for table in shown for row in table.rows)
    if saw:
        return f"Where a table does not say otherwise, {UNSEEN}."
    return f"{UNSEEN.capitalize()}."


def notes(shown: Table, *, is_alone: bool = True) -> list[str]:
    """Write the lines under a table: the shortcut, whether questions were seen, failures, and warnings.

    Where it is not alone, the page says above all of them that no question was seen.
    """
    one = shown.rows[0].record
    lines = _seen(shown, is_alone=is_alone)
    lines += scopes_shown(row.record.plan for row in shown.rows)
    if one.shortcut is not None:
        by_family = one.shortcut_by_family or {}
        each = ", ".join(f"{name} {score:.3f}" for name, score in by_family.items())
        lines.append(
            f"best guess that does not know which value belongs to whom, same samples: {one.shortcut:.3f} ({each})"
        )
    failures: dict[str, list[str]] = {}  # the plans of each
    for row in shown.rows:
        if row.record.failure is not None:
            failures.setdefault(row.record.failure, []).append(row.label)
    for failure, labels in failures.items():
        lines.append(f"{', '.join(labels)} failed: {failure}")
    revisions = {row.record.git for row in shown.rows if row.record.git is not None}
    if len(revisions) > 1:
        lines.append(f"these rows were made by {len(revisions)} revisions of the code; every record names its own")
    for warning in shown.warnings:
        lines.append(f"warning: {warning}")
    return lines


def _seen(shown: Table, *, is_alone: bool) -> list[str]:
    """Say which plans saw the question: all but the edges, some by name, or none."""
    aware, plans = [], []
    for row in shown.rows:
        if not is_full(row.record) and not is_none(row.record):
            plans.append(row.label)
        if row.record.query_aware:
            aware.append(row.label)
    if not aware:
        return [UNSEEN] if is_alone else []
    if len(aware) > 1 and aware == plans:
        return ["every plan saw the question before it folded"]
    who = "it" if len(aware) == 1 else "they"
    return [f"{', '.join(aware)} saw the question before {who} folded"]


def scopes_shown(plans: Iterable[str]) -> list[str]:
    """Write the scope of the plans whose text names one: of two that ran, the better has the row."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        scope = _SCOPE.search(plan)
        if scope is not None:
            found.setdefault(scope.group(2), []).append(without_scope(plan))
    return [f"shown in scope {scope!r}: {', '.join(found[scope])}" for scope in sorted(found)]


BREAKS = re.compile(r"([(,:])(?=\S)")  # where a long plan may break
_IN_MARKDOWN = {
    "|": "\\|",
    "<": "&lt;",
}


def markdown_line(words: Sequence[str]) -> str:
    """Write one line of a Markdown table. A bar in a word ends no cell, and a control character is written out."""
    return "| " + " | ".join(in_markdown(unbroken(word)) for word in words) + " |"


def unbroken(cell: str) -> str:
    """Write a cell so that its intervals do not break over lines."""
    return cell.replace(" to ", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}")


def in_markdown(text: str) -> str:
    """Escape what would end a cell, begin a tag, or act on a terminal."""
    shown = ""
    for character in text:
        if not character.isprintable() and character != "\N{NO-BREAK SPACE}":
            character = repr(character)[1:-1]
        shown += _IN_MARKDOWN.get(character, character)
    return shown


def breakable(name: str) -> str:
    """Let a head break after its underscores, in Markdown and in HTML."""
    return in_markdown(name).replace("_", "_<wbr>")


def ruled(columns: int) -> str:
    """Write the line under the heads of a Markdown table: words to the left, then numbers to the right."""
    return "|---|" + "---:|" * (columns - 1)


def _plan(text: str) -> str:
    """Write a plan in Markdown. The long names of rivals may break, which they cannot between backticks."""
    if not is_rival(text):
        return f"`{in_markdown(text)}`"
    shown = in_markdown(escape(text, quote=False))
    for mark in "*_`[]":
        shown = shown.replace(mark, f"&#{ord(mark)};")
    shown = BREAKS.sub(r"\1<wbr>", shown)
    return f"<code>{shown}</code>"


def markdown(shown: Table, *, is_alone: bool = True) -> str:
    """Write a table as Markdown: title, heads, rows, notes."""
    columns = heads(shown)
    above = " | ".join(map(breakable, columns))
    lines = [f"**{in_markdown(shown.title)}**", "", f"| {above} |", ruled(len(columns))]
    for row in shown.rows:
        plan, *rest = cells(shown, row)
        lines.append(f"| {_plan(plan)} {markdown_line(rest)}")
    lines.append("")
    for note in notes(shown, is_alone=is_alone):
        lines.append(f"- {in_markdown(note)}")
    return "\n".join(lines).rstrip() + "\n"
