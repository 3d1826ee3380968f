"""Score over kept bytes, drawn as SVG text that loads nothing.

One curve per method, one point per size, with its interval; the ceiling, the floor and the best shortcut are lines
across. The same records give the same bytes. It draws to a string and writes no file.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvfold.bench.report.tables import Row, Table, is_full, is_none

COLOURS = ("#0b6e99", "#c2571a", "#3a7d44", "#8a3ffc", "#b8860b", "#a11d33", "#4a5568")
_AXES_INCHES = 5.5  # of width that the axes keep beside a legend
_EDGE_INCHES = 0.4  # above and below it
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def curves(table: Table) -> dict[str, list[Row]]:
    """Group the rows by method, smallest first; the ceiling and the floor are no curves."""
    found: dict[str, list[Row]] = {}
    for row in sorted(table.rows, key=lambda row: row.record.stored):
        record = row.record
        if is_full(record) or is_none(record) or record.failure is not None:
            continue
        # A method's name is its plan without the size.
        name = row.label.replace(f"keep={record.keep}", "")
        name = name.replace("()", "").replace("(, ", "(")
        found.setdefault(name, []).append(row)
    return found


def look_of(number: int) -> dict[str, Any]:
    """Give the colour and the marker of a curve by its number; the first 49 share no pair."""
    rounds = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + rounds) % len(MARKERS)],
        "ms": 5,
        "lw": 1.5,
    }


def _levels(axes, table: Table) -> None:
    one = table.rows[0].record  # every record of a table carries the same ceiling and floor
    axes.axhline(one.full, color="#222222", lw=1, label=f"full cache {one.full:.2f}")
    axes.axhline(one.none, color="#888888", lw=1, ls="--", label=f"no history {one.none:.2f}")
    if one.shortcut is not None:
        axes.axhline(one.shortcut, color="#888888", lw=1, ls=":", label=f"best shortcut {one.shortcut:.2f}")


def _curve(axes, name: str, rows: list[Row], number: int) -> None:
    kept, scores, below, above = [], [], [], []
    for row in rows:
        record = row.record
        low, high = record.interval
        kept.append(record.stored)
        scores.append(record.score)
        below.append(max(0.0, record.score - low))
        above.append(max(0.0, high - record.score))
    axes.errorbar(kept, scores, yerr=(below, above), label=name, capsize=3, **look_of(number))


def score_over_bytes(table: Table) -> str:
    """Draw one table as an SVG element, without the XML head."""
    with figure(table.title) as (whole, axes):
        _levels(axes, table)
        for number, (name, rows) in enumerate(curves(table).items()):
            _curve(axes, name, rows, number)
        stored = [row.record.stored for row in table.rows if row.record.failure is None]
        most = max(stored, default=1.0)
        top = _top(table)
        axes.set(xlabel="kept bytes, as a fraction of the full cache", ylabel="score")
        axes.set_ylim(-0.03 * top, 1.03 * top)
        axes.set_xlim(0, max(1.0, most) + 0.03)
        return as_svg(whole, axes)


def _top(table: Table) -> float:
    """Where scores end: 1, but for suites whose scores are ratios above it, or likelihoods far below."""
    ends = [row.record.interval[1] for row in table.rows if row.record.failure is None]
    highest = max([table.rows[0].record.full, *ends])
    if 0.3 <= highest <= 1.0:
        return 1.0
    return highest or 1.0


@contextmanager
def figure(title: str) -> Iterator[tuple[Any, Any]]:
    """Make an empty picture and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same records must give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "kvfold", "svg.fonttype": "none", "font.size": 10}):
        whole = Figure(figsize=(9.0, 4.4), layout="constrained")
        axes = whole.add_subplot()
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        yield whole, axes


def _make_room(whole: Any, legend: Any) -> None:
    """Grow a picture until its legend fits beside the axes and is not clipped."""
    size = legend.get_window_extent().size / whole.dpi
    width, height = whole.get_size_inches()
    whole.set_size_inches(max(width, size[0] + _AXES_INCHES), max(height, size[1] + _EDGE_INCHES))


def as_svg(whole: Any, axes: Any) -> str:
    """Write a finished picture as an SVG element, with its legend to the right."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    _make_room(whole, legend)
    sheet = io.StringIO()
    FigureCanvasSVG(whole).print_svg(sheet, metadata={"Date": None, "Creator": None})
    text = sheet.getvalue()
    return text[text.index("<svg") :]
