"""Retained: which share of what the history brings is left under each plan, over several suites.

(plan - none) / (full - none), of the means over the same samples: 1 is the full cache, 0 a model that forgets all. A
reply that is likely without any history counts for nothing.
"""

from collections.abc import Sequence

from kvfold.bench.report.overview import suites_of
from kvfold.bench.report.tables import Row, Table, is_full, is_none, markdown_line, ruled
from kvfold.bench.run.statistics import retained as share_of

LEGEND = "(plan - none) / (full - none), with its 95 % interval; empty: the full cache is not clearly above the floor"


def retained(shown: Sequence[Table]) -> str:
    """Write one Markdown table, a row for each plan and a column for each suite. Raises FileError for two of one."""
    suites = suites_of(shown)
    rows: dict[str, list[str]] = {}
    kept: dict[str, float] = {}
    for number, table in enumerate(shown):
        for row in table.rows:
            if not is_full(row.record) and not is_none(row.record) and row.record.failure is None:
                cells = rows.setdefault(row.label, [""] * len(shown))
                cells[number] = _share(row, table)
                kept.setdefault(row.label, row.record.keep or row.record.stored)
    heads = ("plan", *suites)
    lines = [markdown_line(heads), ruled(len(heads))]
    for label in sorted(rows, key=lambda label: (-kept[label], label)):
        lines.append(markdown_line([f"`{label}`", *rows[label]]))
    lines += ["", f"- {LEGEND}", *(f"- {table.title}" for table in shown)]
    return "\n".join(lines) + "\n"


def _share(row: Row, table: Table) -> str:
    """Write what one plan retains; empty where that has no meaning, or where it was stopped earlier than its edges."""
    edges = [one.record for one in table.rows if is_full(one.record) or is_none(one.record)]
    if len(edges) != 2 or any(len(edge.outcomes) != len(row.record.outcomes) for edge in edges):
        return ""
    full, none = sorted(edges, key=is_none)
    found = share_of(row.record.outcomes, full.outcomes, none.outcomes)
    if found is None:
        return ""
    share, (low, high) = found
    return f"{share:.3f} ({low:.3f} to {high:.3f})"
