"""The tiers of the place axis: kinds of memory that slots can lie in. One file, one tier.

A new tier is one new file here: a class that extends Tier (memory/store.py). Its `name` is its name in plans.
"""

import importlib
import pkgutil

from kvfold.errors import PlanError
from kvfold.memory.store import Tier


def tiers() -> dict[str, type[Tier]]:
    """Find every tier by its name: the files of this folder."""
    found: dict[str, type[Tier]] = {}
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for kind in content.values():
            if isinstance(kind, type) and issubclass(kind, Tier) and kind.__module__ == f"{__name__}.{module.name}":
                found[kind.name] = kind
    return found


def tier_of(name: str) -> type[Tier]:
    """Find a tier. Raises PlanError for an unknown name."""
    known = tiers()
    if name not in known:
        raise PlanError(f"tier={name!r} was asked for; there is no such tier; give one of {', '.join(sorted(known))}")
    return known[name]
