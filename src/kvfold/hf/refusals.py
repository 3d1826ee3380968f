"""Refusals of a model: the one sentence that says which was asked for, what is wrong with it, and what to do.

Shared by all files that read models. It reads nothing itself.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from kvfold.errors import ModelError


def refuse(name: str, truth: str, remedy: str, *, cause: BaseException | None = None) -> NoReturn:
    """Raise a ModelError in three parts; `cause` is the foreign error behind it."""
    raise ModelError(f"the model {name!r} was asked for; {truth}; {remedy}") from cause


def refuse_gaps(name: str, report: Mapping[str, Any]) -> None:
    """Raise where transformers' loading report names weights that the files lack or hold in another shape.

    transformers itself would go on with random numbers in their place.
    """
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        refuse(name, f"its files lack {len(lacking)} weights, {lacking[0]} the first", "get a complete copy")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; the error's type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def why_positions_end(positions: str) -> str:
    """Say why a model's positions end although slots were dropped, and what takes them further."""
    if positions == "compact":
        return "what the plan keeps fills the positions; give it a budget in tokens"
    return 'folding saves memory, not positions, unless positions="compact" is asked for'
