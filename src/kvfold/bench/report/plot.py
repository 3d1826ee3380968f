"""Score over kept bytes, drawn as SVG text that stands on its own.

One curve per method, one point per size, with its interval; the ceiling, the floor and the best shortcut are lines
across. The same records give the same bytes. It draws to a string and writes no file.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvfold.bench.report.tables import Row, Table, is_full, is_none

COLOURS = ("#0b6e99", "#c2571a", "#3a7d44", "#8a3ffc", "#b8860b", "#a11d33", "#4a5568")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def curves(table: Table) -> dict[str, list[Row]]:
    """The rows of each method, smallest first; the ceiling and the floor are no curves."""
    found: dict[str, list[Row]] = {}
    for row in sorted(table.rows, key=lambda row: row.record.stored):
        if not is_full(row.record) and not is_none(row.record) and row.record.failure is None:
            name = row.label.replace(f"keep={row.record.keep}", "").replace("()", "").replace("(, ", "(")
            found.setdefault(name, []).append(row)
    return found


def _levels(axes, table: Table) -> None:
    one = table.rows[0].record
    axes.axhline(one.full, color="#222222", lw=1, label=f"full cache {one.full:.2f}")
    axes.axhline(one.none, color="#888888", lw=1, ls="--", label=f"no history {one.none:.2f}")
    if one.shortcut is not None:
        axes.axhline(one.shortcut, color="#888888", lw=1, ls=":", label=f"best shortcut {one.shortcut:.2f}")


def _curve(axes, name: str, rows: list[Row], number: int) -> None:
    colour = COLOURS[number % len(COLOURS)]
    kept = [row.record.stored for row in rows]
    scores = [row.record.score for row in rows]
    below = [max(0.0, row.record.score - row.record.interval[0]) for row in rows]
    above = [max(0.0, row.record.interval[1] - row.record.score) for row in rows]
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # no two curves share both
    axes.errorbar(kept, scores, yerr=(below, above), label=name, color=colour, marker=marker, ms=5, lw=1.5, capsize=3)


def score_over_bytes(table: Table) -> str:
    """The SVG element of one table, without the XML head."""
    with figure(table.title) as (whole, axes):
        _levels(axes, table)
        for number, (name, rows) in enumerate(curves(table).items()):
            _curve(axes, name, rows, number)
        most = max((row.record.stored for row in table.rows if row.record.failure is None), default=1.0)
        top = _top(table)
        axes.set(xlabel="kept bytes, as a fraction of the full cache", ylabel="score", ylim=(-0.03 * top, 1.03 * top))
        axes.set_xlim(0, max(1.0, most) + 0.03)
        return as_svg(whole, axes)


def _top(table: Table) -> float:
    """Where scores end: 1, but for suites whose scores are ratios above it, or likelihoods far below."""
    ends = [row.record.interval[1] for row in table.rows if row.record.failure is None]
    highest = max([table.rows[0].record.full, *ends])
    return 1.0 if 0.3 <= highest <= 1.0 else highest or 1.0


@contextmanager
def figure(title: str) -> Iterator[tuple[Any, Any]]:
    """An empty picture and its axes, in the house's look."""
    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same records must give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "kvfold", "svg.fonttype": "none", "font.size": 10}):
        whole = Figure(figsize=(9.0, 4.4), layout="constrained")
        axes = whole.add_subplot()
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        yield whole, axes


def as_svg(whole: Any, axes: Any) -> str:
    """A finished picture as an SVG element, its legend beside it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    sheet = io.StringIO()
    FigureCanvasSVG(whole).print_svg(sheet, metadata={"Date": None, "Creator": None})
    return sheet.getvalue()[sheet.getvalue().index("<svg") :]
