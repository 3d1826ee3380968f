"""The plan of a rival as text: `kvpress:SnapKV(keep=0.5)`, a rival, its method, its settings.

The colon tells it from one of our plans, whose grammar stays as it is. `keep` is what every sized method is given,
the fraction that it is to keep by the rival's measure; further keywords go to the rival as they are.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from kvfold.bench.peers.catalog import PEERS, Peer
from kvfold.errors import BudgetError, SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalPlan:
    """One rival's method with its settings; prints as the text that builds it."""

    peer: str
    method: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.peer}:{self.method}" + (f"({words})" if words else "")

    @property
    def keep(self) -> float | None:
        """The kept fraction in the settings, where the method takes one."""
        return dict(self.settings).get("keep")

    def with_keep(self, keep: float) -> "RivalPlan":
        """The same method at another size."""
        rest = tuple((name, value) for name, value in self.settings if name != "keep")
        return RivalPlan(peer=self.peer, method=self.method, settings=(("keep", keep), *rest))


def is_rival(plan: str | None) -> bool:
    """Say whether a plan's text names a rival; our texts have no colon before their first bracket."""
    return plan is not None and ":" in plan.partition("(")[0]


def parse(text: str, *, peers: Mapping[str, Peer] = PEERS) -> RivalPlan:
    """Read one text. Raises SuiteError for a rival or a method that is not there, and for a text that is neither."""
    name, colon, call = (part.strip() for part in text.partition(":"))
    if not colon or name not in peers:
        near = get_close_matches(name, peers, n=1) or list(peers)
        raise SuiteError(
            f"the rival {text!r} was asked for; {name!r} is none that is known; write it like "
            f"'kvpress:SnapKV(keep=0.5)', with one of {', '.join(near)}"
        )
    method, settings = _call(call, text)
    if peers[name].method(method).sized:
        _check_keep(dict(settings).get("keep"), text)
    elif "keep" in dict(settings):
        raise SuiteError(f"{text!r} was asked for; {name}:{method} has no size to choose; leave keep= away")
    return RivalPlan(peer=name, method=method, settings=settings)


def parse_all(
    texts: str, *, keeps: Sequence[float] = (), usual: Sequence[float] = (), peers: Mapping[str, Peer] = PEERS
) -> list[RivalPlan]:
    """List every rival that `"A; B"` means at these sizes, as `jobs.parse_jobs` does with our plans."""
    found = []
    for part in texts.split(";"):
        text = part.strip()
        if not text:
            continue
        plan = parse(text, peers=peers)
        sized = peers[plan.peer].method(plan.method).sized
        # `keeps` replace a size in the text; without them, `usual` are for texts that name none.
        sizes = keeps or (usual if plan.keep is None else [plan.keep])
        if sized and not sizes:
            raise BudgetError(f"{text!r} was asked for without a size; give keep= in it, or --keep")
        found += [plan.with_keep(keep) for keep in sizes] if sized else [plan]
    return found


def _check_keep(keep: Any, text: str) -> None:
    if keep is not None and not (isinstance(keep, int | float) and 0 < keep <= 1):
        raise BudgetError(f"{text!r} was asked for; a kept fraction lies above 0 and up to 1; give keep=0.5 or such")


def _call(text: str, whole: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, ()
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        assert not node.args
        names = [word.arg for word in node.keywords]
        assert None not in names
        assert len(set(names)) == len(names)
        return node.func.id, tuple((str(word.arg), ast.literal_eval(word.value)) for word in node.keywords)
    except (SyntaxError, ValueError, AssertionError):
        raise SuiteError(
            f"the rival {whole!r} was asked for; it cannot be read; write it like 'kvpress:SnapKV(keep=0.5)'"
        ) from None
