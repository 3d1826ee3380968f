"""Where the time of a forward goes: attention, weights, selection, copies.

The four pieces of code that do the work are timed while one forward runs: a memory's attention, its layers' folds and
the tail's appends; what is left is weights (projections, feed-forward, norms, head). Timing costs a little itself, so
stages are measured in forwards of their own, never in those that are compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from time import perf_counter
from typing import Any

from kvfold.memory.layer import Layer
from kvfold.memory.memory import Memory
from kvfold.memory.tail import Tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds of one forward, apart from one another; together they are the whole."""

    attention: float
    weights: float
    selection: float  # folds: choosing, encoding, placing
    copies: float  # of new tokens into the tail

    @property
    def metrics(self) -> dict[str, float]:
        """By their keys in records."""
        return {f"{name}_seconds": getattr(self, name) for name in self.__slots__}


def staged(work: Callable[[], None], *, synchronise: Callable[[], None]) -> Stages:
    """Do some work that runs a forward over a folded cache, and say where its time went."""
    timed = partial(_timed, synchronise=synchronise)
    with timed(Memory, "attend") as attend, timed(Layer, "fold") as fold, timed(Tail, "append") as append:
        synchronise()
        start = perf_counter()
        work()
        synchronise()
        whole = perf_counter() - start
    return Stages(
        attention=max(0.0, sum(attend) - sum(fold) - sum(append)),
        weights=max(0.0, whole - sum(attend)),
        selection=sum(fold),
        copies=sum(append),
    )


@contextmanager
def _timed(kind: type, name: str, *, synchronise: Callable[[], None]) -> Iterator[list[float]]:
    """The seconds of every call of one method, while this is entered."""
    spent: list[float] = []
    method = vars(kind)[name]

    @wraps(method)
    def timed(*given: Any, **settings: Any) -> Any:
        synchronise()
        start = perf_counter()
        output = method(*given, **settings)
        synchronise()
        spent.append(perf_counter() - start)
        return output

    setattr(kind, name, timed)
    try:
        yield spent
    finally:
        setattr(kind, name, method)
