"""The drawings of the pages about concepts, as SVG files for a light and a dark page.

`make docs` runs this file. The same code gives the same bytes. Numbers in a drawing are from the records.
"""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from kvfold.bench.run import journal

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "pictures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The colours of one kind of page."""

    ink: str
    faint: str
    sink: str
    kept: str
    raw: str
    gone: str
    far: str


LOOKS = {
    "light": Look(
        ink="#222222", faint="#777777", sink="#8a5a00", kept="#0b6e99", raw="#3a7d44", gone="#d9d9d9", far="#8a3ffc"
    ),
    "dark": Look(
        ink="#e6e6e6", faint="#9a9a9a", sink="#e0a030", kept="#4db6e2", raw="#76c487", gone="#4a4a4a", far="#b48cff"
    ),
}


class Sheet:
    """One drawing in progress: a figure whose units are tenths of an inch, and words for its pieces."""

    def __init__(self, look: Look, *, width: float, height: float) -> None:
        self.look = look
        self.figure = Figure(figsize=(width / 10, height / 10))
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(0, height)
        self.axes.axis("off")

    def cells(self, x: float, y: float, colours: Sequence[str], *, height: float = 3, width: float = 2) -> None:
        """Draw a row of slots, each a small box."""
        for at, colour in enumerate(colours):
            box = Rectangle((x + at * (width + 0.4), y), width, height, facecolor=colour, edgecolor="none")
            self.axes.add_patch(box)

    def words(self, x: float, y: float, text: str, **more: Any) -> None:
        """Write a line of text."""
        style = {"color": self.look.ink, "ha": "left", "va": "center", "fontsize": 10} | more
        self.axes.text(x, y, text, **style)

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """Draw a box with round corners."""
        style = "round,pad=0,rounding_size=1"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, fill=False, edgecolor=self.look.faint)
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], **more: Any) -> None:
        """Draw an arrow."""
        style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": self.look.ink, "lw": 1.2} | more
        self.axes.add_patch(FancyArrowPatch(start, end, **style))

    def svg(self) -> str:
        """Give the drawing as SVG that loads nothing and says nothing of when it was made."""
        with mpl.rc_context({"svg.hashsalt": "kvfold", "svg.fonttype": "path"}):
            out = io.StringIO()
            self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def axes_of_a_plan(look: Look) -> Sheet:
    """Draw the three questions that a plan answers, one after the other."""
    sheet = Sheet(look, width=76, height=26)
    heads = ("select", "encode", "place")
    asks = ("Which slots stay?", "How is a slot stored?", "Where does it lie?")
    for at, (head, ask) in enumerate(zip(heads, asks, strict=True)):
        x = 1 + at * 25.5
        sheet.frame(x, 1, 22.5, 24)
        sheet.words(x + 1.5, 22.3, head, weight="bold", fontsize=12)
        sheet.words(x + 1.5, 19.3, ask, fontsize=9, color=look.faint)
        if at:
            sheet.arrow((x - 2.8, 13), (x - 0.2, 13))
    every = [look.kept if at in (0, 3, 4, 7) else look.gone for at in range(8)]
    sheet.cells(2.5, 11.5, every)
    sheet.words(2.5, 8.5, "4 of 8 tokens stay", fontsize=9)
    sheet.words(2.5, 4, "snapkv(keep=0.5)", fontsize=9, family="monospace")
    sheet.cells(28, 14, [look.kept] * 4, height=3)
    sheet.cells(28, 10.5, [look.kept] * 4, height=1.5)
    sheet.words(38.5, 15.5, "16 bits", fontsize=9)
    sheet.words(38.5, 11.2, "8 bits", fontsize=9)
    sheet.words(28, 4, "int8", fontsize=9, family="monospace")
    for at, (where, count) in enumerate((("device", 1), ("host", 3), ("disk", 0))):
        y = 14.5 - 3.4 * at
        sheet.words(53.5, y, where, fontsize=9)
        sheet.cells(60, y - 0.9, [look.kept if at == 0 else look.far] * count, height=1.8)
    sheet.words(53.5, 4, "sentkv(budget=0.25)", fontsize=9, family="monospace")
    return sheet


def fold(look: Look) -> Sheet:
    """Draw a layer before and after a fold."""
    sheet = Sheet(look, width=76, height=27)
    sinks, folded, tail = [look.sink] * 2, [look.kept] * 5, [look.raw] * 12
    sheet.words(1, 24.5, "before the fold", weight="bold")
    sheet.cells(1, 18.5, sinks + folded + tail)
    sheet.words(1, 11.5, "after the fold", weight="bold")
    sheet.cells(1, 5.5, sinks + folded)
    sheet.cells(1 + 7 * 2.4, 5.5, [look.kept] * 4)
    sheet.arrow((32, 17.8), (22, 9.3), color=look.faint)
    sheet.words(34, 13.5, "of the 12 raw tokens, 4 slots stay", fontsize=9, color=look.faint)
    for at, (colour, name) in enumerate(
        ((look.sink, "sinks: first tokens, never folded"), (look.kept, "folded part"), (look.raw, "raw tail"))
    ):
        x = (1, 33, 50)[at]
        sheet.cells(x, 1, [colour], height=1.6)
        sheet.words(x + 3, 1.8, name, fontsize=9)
    return sheet


def ledger(look: Look) -> Sheet:
    """Draw what four plans store, hold on the device and read, as fractions of the full cache."""
    shown = {record.plan: record for record in journal.gather([DOCS / "records" / "chat-tiny"])}
    plans = ("full", "int8", "sonic(keep=0.2)", "sentkv(budget=0.2)")
    sheet = Sheet(look, width=76, height=31)
    kinds = (("stored", look.kept), ("resident", look.raw), ("attended", look.sink))
    for at, plan in enumerate(plans):
        top = 29 - at * 6.6
        sheet.words(1, top - 2.2, plan, fontsize=9, family="monospace")
        for line, (kind, colour) in enumerate(kinds):
            value, y = getattr(shown[plan], kind), top - line * 1.9
            sheet.axes.add_patch(Rectangle((22, y - 1.4), 27 * value, 1.5, facecolor=colour, edgecolor="none"))
            sheet.words(22.6 + 27 * value, y - 0.65, f"{value:.2f}", fontsize=7.5)
    for at, (kind, colour) in enumerate(kinds):
        sheet.cells(22 + at * 15, 0.8, [colour], height=1.6)
        sheet.words(25 + at * 15, 1.6, kind, fontsize=9)
    return sheet


def positions(look: Look) -> Sheet:
    """Draw the positions of slots after a fold: each slot keeps its own, and the next token counts all tokens."""
    sheet = Sheet(look, width=76, height=25)
    kept = (0, 1, 2, 5, 6, 10)
    sheet.words(1, 22.5, "the text: 12 tokens", weight="bold")
    for at in range(12):
        sheet.cells(1 + at * 4, 16.5, [look.kept if at in kept else look.gone], width=3.4)
        sheet.words(2.7 + at * 4, 15, str(at), fontsize=9, ha="center")
    sheet.words(1, 11, "the cache: 6 slots, and the next token", weight="bold")
    for at, position in enumerate((*kept, 12)):
        x = 1 + at * 4 + (2 if position == 12 else 0)
        sheet.cells(x, 5, [look.raw if position == 12 else look.kept], width=3.4)
        sheet.words(x + 1.7, 3.5, str(position), fontsize=9, ha="center")
    sheet.words(34, 6.5, "The next token has position 12: all tokens count.", fontsize=9, color=look.faint)
    return sheet


def query_aware(look: Look) -> Sheet:
    """Draw both orders of question and fold."""
    sheet = Sheet(look, width=76, height=25)
    orders = (
        ("the question is seen", ("text", "question", "fold", "answer")),
        ("the question comes later", ("text", "fold", "question", "answer")),
    )
    for line, (name, steps) in enumerate(orders):
        y = 15.5 - 11.5 * line
        sheet.words(1, y + 7.2, name, weight="bold")
        for at, step in enumerate(steps):
            x = 1 + at * 19
            sheet.frame(x, y, 14.5, 5)
            colour = {"question": look.sink, "fold": look.kept}.get(step, look.ink)
            sheet.words(x + 7.25, y + 2.5, step, ha="center", color=colour)
            if at:
                sheet.arrow((x - 4.3, y + 2.5), (x - 0.2, y + 2.5))
    return sheet


DRAWINGS: dict[str, Callable[[Look], Sheet]] = {
    "axes": axes_of_a_plan,
    "fold": fold,
    "ledger": ledger,
    "positions": positions,
    "query-aware": query_aware,
}


def drawings() -> Iterator[tuple[Path, str]]:
    """Give every file and what is in it."""
    for name, draw in DRAWINGS.items():
        for kind, look in LOOKS.items():
            yield FOLDER / f"{name}-{kind}.svg", draw(look).svg()


if __name__ == "__main__":
    for path, text in drawings():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"drawn: {path.relative_to(DOCS.parent)}", file=sys.stderr)
