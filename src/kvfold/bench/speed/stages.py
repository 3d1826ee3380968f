"""Where the time of a forward goes: attention, weights, selection, copies.

A memory enters its timer around the stages of its work, so one cache is measured and no other; what no stage takes is
weights (projections, feed-forward, norms, head). Timing costs a little itself, so stages are measured in forwards of
their own, never in those that are compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

STAGES: tuple[str, ...] = ("attend", "fold", "append")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds of one forward by what they were spent on; together they are the whole."""

    attention: float
    weights: float
    selection: float  # folds: choosing, encoding, placing
    copies: float  # of new tokens into the tail

    @property
    def metrics(self) -> dict[str, float]:
        """The seconds by their keys in records."""
        return {f"{name}_seconds": getattr(self, name) for name in self.__slots__}


class StageTimer:
    """Adds up the seconds of stages that may lie inside one another. It changes with every stage that ends."""

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)  # of a stage without the stages inside it
        self._synchronise = synchronise
        self._inner = [0.0]  # seconds of finished stages inside each open one, outermost first

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time in here to this stage."""
        self._synchronise()
        self._inner.append(0.0)
        start = perf_counter()
        try:
            yield
        finally:
            self._synchronise()
            whole = perf_counter() - start
            self.seconds[stage] += whole - self._inner.pop()
            self._inner[-1] += whole


@contextmanager
def observed(cache: Any, timer: Callable[[str], Any]) -> Iterator[None]:
    """Let the layers of a folded cache enter this timer around their stages, in here and not after it."""
    layers = list(cache.memory.layers.values())
    before = [layer.timer for layer in layers]
    for layer in layers:
        layer.timer = timer
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.timer = earlier


def staged(cache: Any, work: Callable[[], None], *, synchronise: Callable[[], None]) -> Stages:
    """Do some work that runs a forward over a folded cache, and say where its time went."""
    timer = StageTimer(synchronise)
    with observed(cache, timer):
        synchronise()
        start = perf_counter()
        work()
        synchronise()
        whole = perf_counter() - start
    return Stages(
        attention=timer.seconds["attend"],
        weights=max(0.0, whole - sum(timer.seconds.values())),
        selection=timer.seconds["fold"],
        copies=timer.seconds["append"],
    )
