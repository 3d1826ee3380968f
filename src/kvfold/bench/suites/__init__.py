"""The suites, one file each, found by their names.

The file's name is the suite's name on the command line, and its last line is `SUITE = ...`, so adding a suite touches
no other file. `bench/suite.py` says what such a file holds.
"""

import pkgutil
from difflib import get_close_matches
from importlib import import_module

from kvfold.bench.suite import Suite
from kvfold.errors import SuiteError


def names() -> list[str]:
    """List every suite that there is a file for."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Suite:
    """Import the suite of that name, written with - or _. Raises SuiteError for one that is not there."""
    known, name = names(), name.replace("-", "_")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(known)}"
        raise SuiteError(f"suite {name!r} was asked for; there is none of that name; {hint}")
    return import_module(f"{__name__}.{name}").SUITE
