"""Score over kept bytes, drawn as SVG text that loads nothing, for a light and for a dark page.

One curve per method, one point per size, with its interval; the full cache and no history are lines across. A picture
has few curves, so that each can be told from the others: the best, and one rival at least. The same records give the
same bytes. It draws to a string and writes no file.
"""

import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.report.tables import Row, Table, is_full, is_none
from kvfold.bench.report.titles import counted

MOST = 4  # curves beside the full cache and no history: more than six lines are hard to distinguish
WITHIN = (0.07, 0.12, 0.25, 0.6)  # curves are compared by what they score within these fractions of the bytes
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SIZE = re.compile(r"\b(keep|rate|bits|budget)=[\d.]+(, )?")
_WIDTH, _HEIGHT, _LINE = 5.6, 3.7, 0.24  # inches of a picture, and of a line of its legend
_LONG = 23  # characters of a name that leaves no room for another beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The colours of one kind of page."""

    ink: str
    faint: str
    ground: str
    curves: tuple[str, ...]


LOOKS = {
    "light": Look(
        ink="#1a202c",
        faint="#6b7280",
        ground="#ffffff",
        curves=("#0b6e99", "#c2571a", "#3a7d44", "#8a3ffc", "#b8860b", "#a11d33", "#4a5568"),
    ),
    "dark": Look(
        ink="#e6e6e6",
        faint="#a3a3a3",
        ground="none",
        curves=("#4db6e2", "#f2994a", "#76c487", "#b48cff", "#e0b040", "#f07f90", "#b8c2cc"),
    ),
}


def curves(table: Table) -> dict[str, list[Row]]:
    """Group the rows by method, smallest first; the ceiling and the floor are no curves."""
    found: dict[str, list[Row]] = {}
    for row in sorted(table.rows, key=lambda row: row.record.stored):
        record = row.record
        if is_full(record) or is_none(record) or record.failure is not None:
            continue
        # A method's name is its plan without the size.
        name = _SIZE.sub("", row.label).replace(", )", ")").replace("()", "")
        found.setdefault(name, []).append(row)
    return found


def chosen(table: Table) -> dict[str, list[Row]]:
    """Choose the curves that are drawn: those that score best within few and many bytes, and a rival."""
    found = curves(table)
    best = sorted(found, key=lambda name: -_worth(found[name]))
    names = best[:MOST]
    rivals = [name for name in best if is_rival(name)]
    if rivals and rivals[0] not in names:
        names[-1] = rivals[0]
    return {name: found[name] for name in names}


def _worth(rows: list[Row]) -> float:
    """The mean of the best scores within growing fractions of the bytes; nothing where a curve holds more."""
    within = []
    for most in WITHIN:
        scores = [row.record.score for row in rows if row.record.stored <= most]
        within.append(max(scores, default=0.0))
    return fmean(within)


def look_of(number: int, look: Look) -> dict[str, Any]:
    """Give the colour and the marker of a curve by its number; the first 49 share no pair."""
    rounds = number // len(look.curves)
    return {
        "color": look.curves[number % len(look.curves)],
        "marker": MARKERS[(number + rounds) % len(MARKERS)],
        "ms": 6,
        "lw": 1.8,
    }


def _levels(axes, table: Table, look: Look) -> None:
    one = table.rows[0].record  # every record of a table carries the same ceiling and floor
    axes.axhline(one.full, color=look.ink, lw=1.2, ls="--", label=f"full cache {one.full:.2f}")
    axes.axhline(one.none, color=look.faint, lw=1.2, ls=":", label=f"no history {one.none:.2f}")


def _curve(axes, name: str, rows: list[Row], style: dict[str, Any]) -> None:
    kept, scores, below, above = [], [], [], []
    for row in rows:
        record = row.record
        low, high = record.interval
        kept.append(record.stored)
        scores.append(record.score)
        below.append(max(0.0, record.score - low))
        above.append(max(0.0, high - record.score))
    axes.errorbar(kept, scores, yerr=(below, above), label=name, capsize=3, **style)


def score_over_bytes(table: Table, *, page: str = "light") -> str:
    """Draw one table as an SVG element, without the XML head, in the colours of one kind of page."""
    look = LOOKS[page]
    drawn = chosen(table)
    others = len(curves(table)) - len(drawn)
    with figure(table.title, look, others=others) as (whole, axes):
        _levels(axes, table, look)
        for number, (name, rows) in enumerate(drawn.items()):
            style = look_of(number, look)
            _curve(axes, name, rows, style)
        stored = [row.record.stored for rows in drawn.values() for row in rows]
        top = _top(table)
        axes.set(xlabel="kept bytes, as a fraction of the full cache", ylabel="score")
        axes.set_ylim(-0.03 * top, 1.03 * top)
        axes.set_xlim(0, max([1.0, *stored]) + 0.03)
        return as_svg(whole, axes)


def _top(table: Table) -> float:
    """Where scores end: 1, but for suites whose scores are ratios above it, or likelihoods far below."""
    ends = [row.record.interval[1] for row in table.rows if row.record.failure is None]
    highest = max([table.rows[0].record.full, *ends])
    if 0.3 <= highest <= 1.0:
        return 1.0
    return highest or 1.0


@contextmanager
def figure(title: str, look: Look, *, others: int = 0) -> Iterator[tuple[Any, Any]]:
    """Make an empty picture and its axes. Its title says how many curves are left to the table."""
    import matplotlib
    from matplotlib.figure import Figure

    title = textwrap.fill(title, 64)
    if others:
        title = f"{title}\nThe table has {counted(others, 'other')}."
    inks: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), look.ink
    )
    grounds: dict[Any, Any] = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), look.ground)
    # A fixed salt and no date: the same records must give the same file. Light and dark share no names in one page.
    fixed: dict[Any, Any] = {"svg.hashsalt": f"kvfold {look.ink}", "svg.fonttype": "none", "font.size": 11}
    with matplotlib.rc_context(fixed | inks | grounds):
        whole = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = whole.add_subplot()
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        yield whole, axes


def as_svg(whole: Any, axes: Any) -> str:
    """Write a finished picture as an SVG element, with its legend below, for which it grows."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    handles, names = axes.get_legend_handles_labels()
    columns = 1 if any(len(name) > _LONG for name in names) else 2
    lines = -(-len(names) // columns)
    legend = whole.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False, fontsize=11)
    height = _HEIGHT + lines * _LINE
    whole.set_size_inches(_WIDTH, height)
    wide = legend.get_window_extent().width / whole.dpi
    whole.set_size_inches(max(_WIDTH, wide + 0.2), height)
    sheet = io.StringIO()
    FigureCanvasSVG(whole).print_svg(sheet, metadata={"Date": None, "Creator": None})
    text = sheet.getvalue()
    return text[text.index("<svg") :]
