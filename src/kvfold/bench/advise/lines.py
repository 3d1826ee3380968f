"""Advice as lines of text: tables of the forecast and of the check.

It works nothing out, and knows no terminal.
"""

from collections.abc import Sequence

from kvfold.bench.advise.check_results import Check
from kvfold.bench.advise.memory_size import megabytes
from kvfold.bench.advise.plan_advice import PlanAdvice

Plans = Sequence[PlanAdvice]


def forecast_lines(plans: Plans) -> list[str]:
    """Write the bytes of each plan at each context."""
    contexts = list(plans[0].forecast_bytes)
    has_adapter = any(one.adapter_bytes for one in plans)
    head = ["plan", *(f"{tokens:,} tokens" for tokens in contexts)]
    rows = [[*head, "adapter", "fits"] if has_adapter else [*head, "fits"]]
    for one in plans:
        sizes = [megabytes(count) for count in one.forecast_bytes.values()]
        learned = [megabytes(one.adapter_bytes) if one.adapter_bytes else ""] if has_adapter else []
        rows.append([one.plan, *sizes, *learned, "yes" if one.fits else "no"])
    return _table(rows)


def check_lines(check: Check, plans: Plans) -> list[str]:
    """Write what was measured, and on what."""
    rows = [["plan", "KL (95 % interval)", "same token", "copied", "tokens/s"]]
    rows += [_measured_row(one) for one in plans if one.measured is not None]
    return [
        f"measured on {check.passages} passages of {check.source}: {check.folded} tokens folded, the next "
        f"{check.compared} compared",
        f"copied: {check.copying}",
        "",
        *_table(rows),
    ]


def _measured_row(one: PlanAdvice) -> list[str]:
    measured = one.measured
    assert measured is not None, "only measured plans have a row"
    loss = measured.loss
    copied = "-" if measured.copied is None else f"{measured.copied:.0%}"
    interval = f"{loss.mean:.2g} ({loss.low:.2g} to {loss.high:.2g})"
    return [one.plan, interval, f"{measured.agreement:.1%}", copied, f"{measured.tokens_per_second:.0f}"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return lines
