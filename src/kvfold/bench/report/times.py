"""Time over context, drawn as SVG text that loads nothing: the time of a token, or a first token, as texts grow.

One picture for each suite, model and stage that was run at two lengths or more (a setting `tokens`), one curve for each
method and size; where records of `speed` hold the time of the stock cache, it is a curve too. The same
records give the same bytes. It draws to strings and writes no file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.bench.report.plot import LOOKS, MOST, as_svg, figure, look_of
from kvfold.bench.report.tables import FLOOR, LOSSLESS, is_full, without_scope
from kvfold.bench.report.titles import counted
from kvfold.bench.run.record import Record

LENGTH = "tokens"  # the setting that says how long a text is
STOCK = "stock_seconds"  # a metric that says what the stock cache took in the same turns
STOCK_CACHE = "stock cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Seconds by tokens, for each plan, in one picture."""

    title: str
    label: str  # of the axis of seconds
    lines: dict[str, dict[int, float]]


def over_context(records: Sequence[Record]) -> list[Curves]:
    """Collect everything that was run at several lengths, in the order in which it first appears."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record.failure is None and isinstance(record.settings.get(LENGTH), int):
            groups.setdefault(_key(record), []).append(record)
    found = []
    for group in groups.values():
        lengths = {record.settings[LENGTH] for record in group}
        if len(lengths) > 1:
            found.append(_curves(group))
    return found


def _key(record: Record) -> tuple:
    """Everything but the plan and the length that records of one picture share."""
    rest = sorted((name, value) for name, value in record.settings.items() if name != LENGTH)
    return (
        record.suite,
        record.model,
        record.dtype,
        record.device,
        record.threads,
        str(rest),
    )


def _curves(group: Sequence[Record]) -> Curves:
    first = group[0]
    per_token = any(record.tpot_seconds > 0 for record in group)
    lines: dict[str, dict[int, float]] = {}
    for record in group:
        tokens = record.settings[LENGTH]
        seconds = record.tpot_seconds if per_token else record.ttft_seconds
        points = lines.setdefault(without_scope(record.plan), {})
        points[tokens] = record.metrics.get("seconds", seconds)
        if is_full(record) and STOCK in record.metrics:
            lines.setdefault(STOCK_CACHE, {})[tokens] = record.metrics[STOCK]
    stage = f", {first.settings['stage']}" if "stage" in first.settings else ""
    machine = f"{first.dtype}, {first.device}, {counted(first.threads, 'thread')}"
    return Curves(
        title=f"{first.suite}{stage} on {first.model} ({machine})",
        label="seconds a token" if per_token else "seconds to the first token",
        lines={name: dict(sorted(points.items())) for name, points in lines.items()},
    )


def time_over_context(curves: Curves, *, page: str = "light") -> str:
    """Draw one picture as an SVG element, without the XML head, in the colours of one kind of page."""
    look = LOOKS[page]
    names = chosen(curves)
    others = [name for name in curves.lines if name not in (*names, *FLOOR)]
    with figure(curves.title, look, others=len(others)) as (whole, axes):
        lengths: set[int] = set()
        for number, name in enumerate(names):
            points = curves.lines[name]
            style = look_of(number, look)
            axes.plot(list(points), list(points.values()), label=name, **style)
            lengths |= set(points)
        ticks = sorted(lengths)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
        axes.minorticks_off()
        axes.set(xlabel="tokens of context", ylabel=curves.label)
        axes.set_ylim(bottom=0)
        return as_svg(whole, axes)


def chosen(curves: Curves) -> list[str]:
    """Choose the lines that are drawn: `full`, the stock cache, and the plans that are quickest on the longest text."""
    edges = (*LOSSLESS, STOCK_CACHE)
    plans = [name for name in curves.lines if name not in (*edges, *FLOOR)]
    longest = max(map(max, curves.lines.values()))
    plans.sort(key=lambda name: curves.lines[name].get(longest, math.inf))
    return [name for name in curves.lines if name in (*edges, *plans[:MOST])]
