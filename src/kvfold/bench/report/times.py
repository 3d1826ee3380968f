"""Time over context, drawn as SVG text that stands on its own: what a token, or a first token, costs as texts grow.

One picture for each suite, model and stage that was run at two lengths or more (a setting `tokens`), one curve for each
method and size; where records of `speed` tell what the stock cache took beside `full`, it is a curve too. The same
records give the same bytes. It draws to strings and writes no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.bench.report.plot import COLOURS, MARKERS, as_svg, figure
from kvfold.bench.report.tables import is_full, without_scope
from kvfold.bench.run.record import Record

LENGTH = "tokens"  # the setting that says how long a text is
STOCK = "stock_seconds"  # a metric that says what the stock cache took in the same turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Seconds by tokens, for each plan, in one picture."""

    title: str
    label: str  # what the seconds are of
    lines: dict[str, dict[int, float]]


def over_context(records: Sequence[Record]) -> list[Curves]:
    """Everything that was run at several lengths, in the order in which it first appears."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record.failure is None and isinstance(record.settings.get(LENGTH), int):
            rest = {name: value for name, value in record.settings.items() if name != LENGTH}
            key = (record.suite, record.model, record.dtype, record.device, record.threads, str(sorted(rest.items())))
            groups.setdefault(key, []).append(record)
    return [_curves(group) for group in groups.values() if len({one.settings[LENGTH] for one in group}) > 1]


def _curves(group: Sequence[Record]) -> Curves:
    first = group[0]
    per_token = any(record.tpot_seconds > 0 for record in group)
    lines: dict[str, dict[int, float]] = {}
    for record in group:
        tokens, seconds = record.settings[LENGTH], record.tpot_seconds if per_token else record.ttft_seconds
        lines.setdefault(without_scope(record.plan), {})[tokens] = record.metrics.get("seconds", seconds)
        if is_full(record) and STOCK in record.metrics:
            lines.setdefault("stock cache", {})[tokens] = record.metrics[STOCK]
    stage = f", {first.settings['stage']}" if "stage" in first.settings else ""
    return Curves(
        title=f"{first.suite}{stage} on {first.model} ({first.dtype}, {first.device}, {first.threads} threads)",
        label="seconds a token" if per_token else "seconds to the first token",
        lines={name: dict(sorted(points.items())) for name, points in lines.items()},
    )


def time_over_context(curves: Curves) -> str:
    """The SVG element of one picture, without the XML head."""
    with figure(curves.title) as (whole, axes):
        for number, (name, points) in enumerate(curves.lines.items()):
            marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(list(points), list(points.values()), label=name, color=colour, marker=marker, ms=5, lw=1.5)
        every = sorted({tokens for points in curves.lines.values() for tokens in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [f"{tokens:,}" for tokens in every])
        axes.minorticks_off()
        axes.set(xlabel="tokens of context", ylabel=curves.label)
        axes.set_ylim(bottom=0)
        return as_svg(whole, axes)
