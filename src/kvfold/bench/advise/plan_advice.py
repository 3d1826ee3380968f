"""PlanAdvice: what is known of one plan, forecast and measured.

A value only; advice.py holds those of all plans.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvfold.bench.advise.check_results import Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAdvice:
    """What is known of one plan."""

    plan: str
    forecast_bytes: Mapping[int, int]  # by context in tokens
    adapter_bytes: int  # held once for all caches of the model
    fits: bool  # the memory at the context, with its adapter
    measured: Measured | None
    left_out: str | None  # why nothing was measured, where something was asked to be
