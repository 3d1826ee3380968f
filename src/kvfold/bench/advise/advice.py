"""Advice: what was forecast and measured of each plan, and which one to take, as a value that prints and becomes JSON.

Bytes are those of the layers that fold, at the context that was asked for. It measures nothing.
"""

from dataclasses import asdict, dataclass
from typing import Any

from kvfold.bench.advise.check_results import Check
from kvfold.bench.advise.lines import check_lines, forecast_lines
from kvfold.bench.advise.plan_advice import PlanAdvice
from kvfold.hf.model_shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The plans, the check, and the recommendation with its reason."""

    shape: ModelShape
    dtype: str
    context: int
    memory_bytes: int | None
    plans: tuple[PlanAdvice, ...]
    check: Check | None
    take: str | None  # the plan to take; None: nothing fits
    reason: str  # one sentence
    notes: tuple[str, ...]

    @property
    def recommended(self) -> PlanAdvice | None:
        """What is known of the plan to take."""
        return next((one for one in self.plans if one.plan == self.take), None)

    def as_json(self) -> dict[str, Any]:
        """Give everything in JSON's types."""
        check = self.check
        return {
            "model": self.shape.name,
            "dtype": self.dtype,
            "context": self.context,
            "memory_bytes": self.memory_bytes,
            "folding_layers": len(self.shape.layers),
            "other_layers": dict(self.shape.others),
            "take": self.take,
            "reason": self.reason,
            "notes": list(self.notes),
            "check": None if check is None else check.as_json(),
            "plans": [asdict(one) for one in self.plans],
        }

    def __str__(self) -> str:
        """Write everything as lines of text."""
        layers = f"{self.shape.name}: {len(self.shape.layers)} layers fold"
        lines = [f"{layers}; bytes of one conversation's cache, in {self.dtype}", *self.notes, ""]
        lines += forecast_lines(self.plans)
        if self.check is not None:
            lines += ["", *check_lines(self.check, self.plans)]
        missing = [f"{one.plan}: {one.left_out}" for one in self.plans if one.left_out]
        lines += ["", *missing] if missing else []
        return "\n".join([*lines, "", self.reason])
