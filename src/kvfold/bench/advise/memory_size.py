"""Sizes of memory as people write them: `2GB`, `200 MB`, `1.5GiB`, or a plain number of bytes.

Units are of 1,000 (MB) or of 1,024 (MiB). It knows no plan.
"""

import re

from kvfold.errors import BudgetError
from kvfold.integers import MOST_BYTES

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")


def bytes_from(size: str | int) -> int:
    """Read a size. Raises BudgetError for what is none.

    >>> bytes_from("1.5GB")
    1500000000
    """
    found = _WRITTEN.fullmatch(str(size).lower())
    unit = _UNITS.get(found[2]) if found else None
    count = int(float(found[1]) * unit) if found and unit else 0
    if not 0 < count <= MOST_BYTES:
        raise BudgetError(f"memory={size!r:.80} was given; it is no size of memory; give one such as 200MB or 2GB")
    return count


def megabytes(count: float) -> str:
    """Write bytes in MB or GB, with three digits or more.

    >>> megabytes(188_700_000)
    '189 MB'
    """
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"
