"""Whole numbers that a caller gives: checked where they enter, so that no count is half, negative or a word.

Numbers of numpy and torch count as whole numbers where Python takes them for an index. True and False do not. It knows
nothing of what is counted.
"""

import operator
from typing import Any

from kvfold.errors import KvfoldError

MOST = 2**31 - 1  # tokens, slots or turns: int32 holds positions
MOST_BYTES = 2**62  # a size


def integer(
    name: str,
    value: Any,
    *,
    least: int,
    most: int = MOST,
    error: type[KvfoldError],
) -> int:
    """Give a whole number from `least` to `most` as Python's own. Raises `error`, in one line, for all else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise error(f"{name}={value!r:.80} was given; it is no whole number; give one of {least} or more") from None
    if not least <= number <= most:
        shown = str(number) if abs(number) < 10**30 else "a number of very many digits"
        remedy = f"at least {least}" if number < least else f"at most {most}"
        raise error(f"{name}={shown} was given; it counts from {least} to {most}; give {remedy}")
    return number


def integer_or_none(
    name: str,
    value: Any,
    *,
    least: int,
    most: int = MOST,
    error: type[KvfoldError],
) -> int | None:
    """Give a whole number as `integer` does, or None where None was given."""
    return None if value is None else integer(name, value, least=least, most=most, error=error)
