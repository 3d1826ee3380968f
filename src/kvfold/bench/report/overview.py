"""One table over several suites: a row for each plan and size, a column for each suite, for a README.

Rows stand as in the tables of single suites (`tables.py`): the ceiling, the floor, then most kept first. What a plan
holds differs a little from suite to suite, so its fractions are ranges where they do. The full tables have what is
left out here: paired differences, families and notes.
"""

from collections.abc import Sequence

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.report.tables import Row, Table, is_full, is_none
from kvfold.errors import FileError

FRACTIONS = ("stored", "resident", "attended")
LEGEND = (
    "scores with their 95 % intervals; **bold**: the best of its size or in a tie with it, and above `none`; "
    "`=`: in a tie with `full`",
    "fractions are of the full cache, as ranges where suites differ; *claims* is what a rival says that it keeps",
)


def overview(shown: Sequence[Table]) -> str:
    """The Markdown of one table over all of these. Raises FileError where two of them are of one suite."""
    suites = [table.rows[0].record.suite for table in shown]
    twice = next((suite for suite in suites if suites.count(suite) > 1), None)
    if twice is not None:
        raise FileError(
            f"one table over all suites was asked for; {twice} was run with several samples or models; "
            "give folders that hold one run of each suite"
        )
    heads = ("plan", *FRACTIONS, *suites)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(words) + " |" for words in (*_rows(shown), *_shortcuts(shown))]
    return "\n".join([*lines, "", *(f"- {note}" for note in (*LEGEND, *_notes(shown)))]) + "\n"


def _rows(shown: Sequence[Table]) -> list[list[str]]:
    found: dict[str, list[Row | None]] = {}
    for number, table in enumerate(shown):
        for row in table.rows:
            found.setdefault(row.label, [None] * len(shown))[number] = row
    ordered = sorted(found.items(), key=lambda pair: _order([row for row in pair[1] if row is not None]))
    return [[f"`{label}`", *_fractions(rows), *map(_score, rows, shown)] for label, rows in ordered]


def _order(rows: Sequence[Row]) -> tuple[bool, bool, float, bool, str]:
    """The edges, then by size; of one size ours first."""
    one = next((row.record for row in rows if row.record.failure is None), rows[0].record)
    size = one.keep if one.keep is not None else one.stored if one.failure is None else 0.0
    return not is_full(one), not is_none(one), -size, is_rival(one.plan), rows[0].label


def _fractions(rows: Sequence[Row | None]) -> list[str]:
    held = [row.record for row in rows if row is not None and row.record.failure is None]
    claims = [record.claimed for record in held if record.claimed is not None]
    words = [_range([getattr(record, name) for record in held]) for name in FRACTIONS]
    return [words[0] + (f" (claims {_range(claims)})" if claims else ""), *words[1:]]


def _range(values: Sequence[float]) -> str:
    """One number, or from the least to the most where they differ at two digits."""
    ends = sorted({f"{value:.2f}" for value in (min(values, default=0.0), max(values, default=0.0))})
    return " to ".join(ends) if values else ""


def _score(row: Row | None, table: Table) -> str:
    if row is None:
        return ""
    if row.record.failure is not None:
        return "failed"
    digits = table.digits - 1
    score, (low, high) = row.record.score, row.record.interval
    said, ends = f"{score:.{digits}f}", f"({low:.{digits}f} to {high:.{digits}f})"
    said = f"**{said}**" if row.standing and score > row.record.none else said
    return f"{said} {ends}" + (" =" if row.against_full is not None and row.against_full.tie else "")


def _shortcuts(shown: Sequence[Table]) -> list[list[str]]:
    scores = [table.rows[0].record.shortcut for table in shown]
    if all(score is None for score in scores):
        return []
    return [["*best shortcut*", *("" for _ in FRACTIONS), *("" if s is None else f"{s:.2f}" for s in scores)]]


def _notes(shown: Sequence[Table]) -> list[str]:
    """What was asked of whom, and what failed."""
    lines = [table.title for table in shown]
    aware = {row.label for table in shown for row in table.rows if row.record.query_aware}
    lines.append(f"saw the question before folding: {', '.join(sorted(aware)) or 'no plan'}")
    failures: dict[str, set[str]] = {}
    for table in shown:
        for row in table.rows:
            if row.record.failure is not None:
                failures.setdefault(f"`{row.record.plan.partition('(')[0]}`: {row.record.failure}", set()).add(
                    table.rows[0].record.suite
                )
    lines += [f"failed on {', '.join(sorted(suites))}, {failure}" for failure, suites in failures.items()]
    found = {(table.rows[0].record.suite, warning) for table in shown for warning in table.warnings}
    lines += [f"warning, {suite}: {warning}" for suite, warning in sorted(found) if not is_rival(warning)]
    return lines
