"""The section of a page about each method: the docstring of its file, its settings, and its rows together.

A method is one member of a plan, or a rival's method. The docstring of its file names the paper and says where ours
differs; a member that this version does not know is shown by its plan text alone. It reads records and docstrings,
and draws nothing.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.report.tables import unbroken
from kvfold.bench.run.record import Record
from kvfold.plan import members

AXES = ("select", "encode", "place")
HEADS = ("plan", "suite", "stored", "resident", "attended", "score", "interval", "full", "none", "per token s")
_NAME = re.compile(r"[A-Za-z_]\w*(?=\s*(?:\(|\+|$))")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSection:
    """One method on a page."""

    name: str
    axis: str  # "select", "encode", "place", or "rival"
    words: tuple[str, ...]  # a paragraph each
    settings: tuple[str, ...]  # `name=default`
    rows: tuple[tuple[str, ...], ...]  # under HEADS

    @property
    def anchor(self) -> str:
        """The anchor of its section, for links in the page."""
        return "method-" + re.sub(r"\W+", "-", self.name)


def methods(records: Sequence[Record]) -> list[MethodSection]:
    """Describe every method that a plan of these records names, in the order in which they first appear."""
    found: dict[str, list[Record]] = {}
    for record in records:
        for name in names(record.plan):
            found.setdefault(name, []).append(record)
    return [_method(name, group) for name, group in found.items()]


def names(plan: str) -> list[str]:
    """List the members that a plan's text names; a rival's plan is one method by itself."""
    if is_rival(plan):
        return [plan.partition("(")[0]]
    without = re.sub(r"\([^()]*\)", "", plan)
    return _NAME.findall(without)


def _method(name: str, group: Sequence[Record]) -> MethodSection:
    rows = tuple(_row(record) for record in group)
    if is_rival(name):
        words = f"A cache of {name.partition(':')[0]}, run in a process of its own on the same tokens."
        return MethodSection(name=name, axis="rival", words=(words,), settings=(), rows=rows)
    for axis in AXES:
        kind = members(axis).get(name)
        if kind is not None:
            return MethodSection(
                name=name,
                axis=axis,
                words=_paragraphs(sys.modules[kind.__module__].__doc__ or ""),
                settings=tuple(f"{field.name}={field.default!r}" for field in fields(kind) if field.init),
                rows=rows,
            )
    return MethodSection(name=name, axis="unknown", words=("No member of this version.",), settings=(), rows=rows)


def _paragraphs(docstring: str) -> tuple[str, ...]:
    """The paragraphs of a file's docstring, each on one line, without the name; "Ours differs" begins one."""
    _, _, after = docstring.strip().partition(": ")  # the heading has the name
    text = (after[:1].upper() + after[1:]).replace("\nOurs differs", "\n\nOurs differs")
    return tuple(" ".join(part.split()) for part in text.split("\n\n"))


def _row(record: Record) -> tuple[str, ...]:
    if record.failure is not None:
        return (record.plan, record.suite, "", "", "", "failed", record.failure.partition(":")[0], "", "", "")
    return (
        record.plan,
        record.suite,
        *(f"{value:.3f}" for value in (record.stored, record.resident, record.attended, record.score)),
        unbroken(f"{record.interval[0]:.3f} to {record.interval[1]:.3f}"),
        f"{record.full:.3f}",
        f"{record.none:.3f}",
        f"{record.tpot_seconds:.4f}",
    )
