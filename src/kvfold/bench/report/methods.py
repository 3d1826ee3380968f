"""What a page says of each method in it: the text of its plans, what it is by its own words, and its rows together.

A method is one member of a plan, or a rival's method. Its words are the docstring of its file, with the paper and where
ours differs; a member that this version does not know is shown by its plan text alone. It reads records and docstrings,
and draws nothing.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from kvfold.bench.peers.plans import is_rival
from kvfold.bench.run.record import Record
from kvfold.plan import members

AXES = ("select", "encode", "place")
HEADS = ("plan", "suite", "stored", "resident", "attended", "score", "interval", "full", "none", "per token s")
_NAME = re.compile(r"[A-Za-z_]\w*(?=\s*(?:\(|\+|$))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method of a page."""

    name: str
    axis: str  # "select", "encode", "place", or "rival"
    words: tuple[str, ...]  # its own, a paragraph each
    settings: tuple[str, ...]  # `name=default`
    rows: tuple[tuple[str, ...], ...]  # under HEADS

    @property
    def anchor(self) -> str:
        """Where it stands in a page."""
        return "method-" + re.sub(r"\W+", "-", self.name)


def methods(records: Sequence[Record]) -> list[Method]:
    """Every method that a plan of these records names, in the order in which they first appear."""
    found: dict[str, list[Record]] = {}
    for record in records:
        for name in names(record.plan):
            found.setdefault(name, []).append(record)
    return [_method(name, group) for name, group in found.items()]


def names(plan: str) -> list[str]:
    """The members that a plan's text names; a rival's plan is one method by itself."""
    if is_rival(plan):
        return [plan.partition("(")[0]]
    without = re.sub(r"\([^()]*\)", "", plan)
    return _NAME.findall(without)


def _method(name: str, group: Sequence[Record]) -> Method:
    rows = tuple(_row(record) for record in group)
    if is_rival(name):
        words = f"A cache of {name.partition(':')[0]}, run in a process of its own on the same tokens."
        return Method(name=name, axis="rival", words=(words,), settings=(), rows=rows)
    for axis in AXES:
        kind = members(axis).get(name)
        if kind is not None:
            said = (sys.modules[kind.__module__].__doc__ or "").strip()
            words = tuple(
                " ".join(part.split()) for part in said.replace("\nOurs differs", "\n\nOurs differs").split("\n\n")
            )
            settings = tuple(f"{field.name}={field.default!r}" for field in fields(kind) if field.init)
            return Method(name=name, axis=axis, words=words, settings=settings, rows=rows)
    return Method(name=name, axis="unknown", words=("No member of this version.",), settings=(), rows=rows)


def _row(record: Record) -> tuple[str, ...]:
    if record.failure is not None:
        return (record.plan, record.suite, "", "", "", "failed", record.failure.partition(":")[0], "", "", "")
    return (
        record.plan,
        record.suite,
        *(f"{value:.3f}" for value in (record.stored, record.resident, record.attended, record.score)),
        f"{record.interval[0]:.3f} to {record.interval[1]:.3f}",
        f"{record.full:.3f}",
        f"{record.none:.3f}",
        f"{record.tpot_seconds:.4f}",
    )
