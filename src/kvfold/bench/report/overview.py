"""One table over several suites: a row for each plan and size, a column for each suite, for a README.

Rows stand as in the tables of single suites (`tables.py`): the ceiling, the floor, then most kept first. What a plan
holds differs a little from suite to suite, so its fractions are ranges where they do. The full tables have what is
left out here: paired differences, families and notes.
"""

from collections.abc import Sequence

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.report.tables import Row, Table, is_full, is_none, markdown_line, ruled, scopes_shown
from kvfold.bench.run.record import Record
from kvfold.errors import FileError

FRACTIONS = ("stored", "resident", "attended")
LEGEND = (
    "scores with their 95 % intervals; **bold**: the best of its size or in a tie with it, and above `none`; "
    "`=`: in a tie with `full`",
    "fractions are of the full cache, as ranges where suites differ; *claims* is what a rival says that it keeps",
)


def overview(shown: Sequence[Table]) -> str:
    """Write one Markdown table over all of these. Raises FileError where two of them are of one suite."""
    suites = suites_of(shown)
    heads = ("plan", *FRACTIONS, *suites)
    lines = [markdown_line(heads), ruled(len(heads))]
    for words in (*_rows(shown), *_shortcuts(shown)):
        lines.append(markdown_line(words))
    lines.append("")
    for note in (*LEGEND, *_notes(shown)):
        lines.append(f"- {note}")
    return "\n".join(lines) + "\n"


def suites_of(shown: Sequence[Table]) -> list[str]:
    """Name the suite of each table. Raises FileError where two of them are of one suite."""
    suites = [_suite(table) for table in shown]
    for suite in suites:
        if suites.count(suite) > 1:
            raise FileError(
                f"one table over all suites was asked for; {suite} was run with several samples or models; "
                "give folders that hold one run of each suite"
            )
    return suites


def _suite(table: Table) -> str:
    return table.rows[0].record.suite


def _rows(shown: Sequence[Table]) -> list[list[str]]:
    """The cells of every plan, a row a plan and size; a suite without it has an empty cell."""
    found: dict[str, list[Row | None]] = {}
    for number, table in enumerate(shown):
        for row in table.rows:
            in_suites = found.setdefault(row.label, [None] * len(shown))
            in_suites[number] = row
    lines = []
    for label in sorted(found, key=lambda label: _order(found[label])):
        in_suites = found[label]
        scores = map(_score, in_suites, shown)
        lines.append([f"`{label}`", *_fractions(in_suites), *scores])
    return lines


def _order(in_suites: Sequence[Row | None]) -> tuple[bool, bool, float, bool, str]:
    """The ceiling and the floor first, then by size; of one size ours before rivals."""
    rows = [row for row in in_suites if row is not None]
    finished = [row.record for row in rows if row.record.failure is None]
    one = finished[0] if finished else rows[0].record
    return (
        not is_full(one),
        not is_none(one),
        -_size(one),
        is_rival(one.plan),
        rows[0].label,
    )


def _size(record: Record) -> float:
    if record.keep is not None:
        return record.keep
    return record.stored if record.failure is None else 0.0


def _fractions(in_suites: Sequence[Row | None]) -> list[str]:
    """What a plan holds, as ranges over suites; after the first, what a rival claims."""
    records = [row.record for row in in_suites if row is not None and row.record.failure is None]
    words = []
    for name in FRACTIONS:
        words.append(_range([getattr(record, name) for record in records]))
    claims = [record.claimed for record in records if record.claimed is not None]
    if claims:
        words[0] += f" (claims {_range(claims)})"
    return words


def _range(values: Sequence[float]) -> str:
    """One number, or from the least to the most where they differ at two digits."""
    if not values:
        return ""
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def _score(row: Row | None, table: Table) -> str:
    if row is None:
        return ""
    record = row.record
    if record.failure is not None:
        return "failed"
    digits = table.digits - 1
    low, high = record.interval
    score = f"{record.score:.{digits}f}"
    if row.standing and record.score > record.none:
        score = f"**{score}**"
    interval = f"({low:.{digits}f} to {high:.{digits}f})"
    ties = row.against_full is not None and row.against_full.tie
    return f"{score} {interval} =" if ties else f"{score} {interval}"


def _shortcuts(shown: Sequence[Table]) -> list[list[str]]:
    """The line of the best shortcuts; none where no suite has one."""
    scores = [table.rows[0].record.shortcut for table in shown]
    if all(score is None for score in scores):
        return []
    cells = ["" if score is None else f"{score:.2f}" for score in scores]
    return [["*best shortcut*", *("" for _ in FRACTIONS), *cells]]


def _notes(shown: Sequence[Table]) -> list[str]:
    """The titles of the suites, the plans that saw questions, failures and warnings."""
    lines = [table.title for table in shown]
    aware, warnings = set(), set()
    failures: dict[str, set[str]] = {}  # the suites of each failure
    for table in shown:
        suite = _suite(table)
        warnings |= {(suite, warning) for warning in table.warnings if not is_rival(warning)}
        for row in table.rows:
            if row.record.query_aware:
                aware.add(row.label)
            if row.record.failure is not None:
                method = row.record.plan.partition("(")[0]
                failures.setdefault(f"`{method}`: {row.record.failure}", set()).add(suite)
    lines.append(f"saw the question before folding: {', '.join(sorted(aware)) or 'no plan'}")
    plans = dict.fromkeys(row.record.plan for table in shown for row in table.rows)
    lines += scopes_shown(plans)
    for failure, suites in failures.items():
        lines.append(f"failed on {', '.join(sorted(suites))}, {failure}")
    for suite, warning in sorted(warnings):
        lines.append(f"warning, {suite}: {warning}")
    return lines
