"""Plans made of every member of the registry, so that a new file in select/, encode/ or place/ brings its tests.

Lossless plans have room for everything; lossy ones are small. Members that take no budget appear as they are.
"""

import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.memory.candidates import Candidates
from kvfold.place import tiers
from kvfold.place.base import Place
from kvfold.place.sentkv import SentKV
from kvfold.plan import Plan, members
from kvfold.select.base import PerLayerSelect, Select

TOKENS = 14  # of a lossy plan

# The tier of the examples' folder, found by its file like those of the package; conftest.py adds the other examples.
EXAMPLES_FOLDER = Path(__file__).parent / "examples"
tiers.__path__.append(str(EXAMPLES_FOLDER / "tiers"))
EXAMPLES = {module.name for module in pkgutil.iter_modules([str(folder) for folder in EXAMPLES_FOLDER.iterdir()])}


def _select(name: str, **budget: object) -> Select:
    kind = members("select")[name]
    try:
        return kind(**budget)
    except KvfoldError:
        return kind()


def _roomy_place(name: str) -> Place:
    """A place member that reads everything, if it has a budget."""
    kind = members("place")[name]
    return kind(budget=1.0) if "budget" in {field.name for field in fields(kind)} else kind()


# Chosen token by token, so that chunks change nothing; forwards of several tokens otherwise read everything.
PLACED = SentKV(budget=TOKENS, length=5, window=2, recent=2, prompt="chosen", every=1)


def placed() -> dict[str, Plan]:
    """A place member that reads little, alone and with others."""
    alone = {
        "sentkv": Plan(place=PLACED),
        "sentkv-rest": Plan(place=replace(PLACED, mean_of_unselected=True, summary="mean")),
    }
    evicted = Plan(select=_select("snapkv", tokens=2 * TOKENS), place=PLACED)
    alone["sentkv-dictionary"] = Plan(place=replace(PLACED, tier="dictionary"))
    return alone | {"snapkv+sentkv": evicted, "int4+sentkv": Plan(encode=members("encode")["int4"](), place=PLACED)}


def lossless() -> dict[str, Plan]:
    """Plans that drop nothing and round nothing: every select member with room for all, every lossless codec."""
    roomy = {name: Plan(select=_select(name, tokens=10**6)) for name in members("select") if name != "none"}
    exact = {name: Plan(encode=kind()) for name, kind in members("encode").items() if kind.lossless}
    every = roomy | exact | {name: Plan(place=_roomy_place(name)) for name in members("place")}
    return {name: plan for name, plan in every.items() if name == "full" or plan != Plan()}


def lossy() -> dict[str, Plan]:
    """Each select member alone with a small budget, each codec alone, and each select member in scope "turn"."""
    alone = {name: Plan(select=_select(name, tokens=TOKENS)) for name in members("select")}
    coded = {name: Plan(encode=kind()) for name, kind in members("encode").items()}
    coded["dynakv-int8"] = Plan(encode=members("encode")["dynakv"](basis="heads", int8=True))
    turns = {f"{name}-turn": plan.with_scope("turn") for name, plan in alone.items() if plan.has_budget}
    return alone | coded | turns | placed()


def pairs() -> dict[str, Plan]:
    """Every select member of the package with every codec of it."""
    return {
        f"{name}+{code}": Plan(select=_select(name, tokens=TOKENS), encode=kind())
        for name in members("select")
        for code, kind in members("encode").items()
        if not kind.lossless and name != "full" and not {name, code} & EXAMPLES
    }


def mostly(names: Iterable[str]) -> list[object]:
    """The names as parameters of a test; the long tail, most pairs and scopes, is left to `make grid`."""
    tail = [name for name in names if ("+" in name or "-" in name or name == "dense") and name not in _SHOWN]
    return [pytest.param(name, marks=pytest.mark.grid) if name in tail else name for name in names]


_SHOWN = ("snapkv+int4", "h2o-turn", "snapkv+sentkv", "sentkv-dictionary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Uneven(PerLayerSelect):
    """Head h keeps h slots less than it may: what a method with budgets per head looks like to a layer."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Every other slot from the newest, fewer in later heads; one fewer where the oldest position is odd."""
        kv, slots = candidates.kv, candidates.slots
        kept = torch.zeros(kv.positions.shape, dtype=torch.bool)
        for row in range(kept.shape[0]):
            for head in range(kept.shape[1]):
                count = max(slots - head - int(kv.positions[row, head, 0]) % 2, 1)
                kept[row, head, torch.arange(len(kv) - 1, -1, -2)[:count]] = True
        return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenPositions(PerLayerSelect):
    """Even positions only, and of these the newest: a choice that no numerical noise can change."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """The newest even positions."""
        even = candidates.kv.positions % 2 == 0
        later = even.flip(2).cumsum(2).flip(2)
        return even & (later <= candidates.slots)
