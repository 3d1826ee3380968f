"""How sure a score is: bootstrap intervals over samples, paired differences, and when two scores are a tie.

Everything is a percentile bootstrap with a fixed seed, so the same outcomes give the same interval. It knows numbers
only. It does not correct for many comparisons, and an interval of equal outcomes has no width, however few they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2_000
LEVEL = 0.95
SEED = 20_240_229


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The mean difference of two plans over the same samples, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0.0 <= self.high


def _means(values: np.ndarray) -> np.ndarray:
    """The means of DRAWS resamples; which samples are drawn depends on their number only, so pairs stay pairs."""
    return values[_picks(len(values))].mean(axis=1)


def _picks(count: int) -> np.ndarray:
    """Numbers of samples, a resample a row [DRAWS, count]."""
    return np.random.default_rng(SEED).integers(count, size=(DRAWS, count))


def _bounds(means: np.ndarray) -> tuple[float, float]:
    edge = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [edge, 100 - edge])
    return float(low), float(high)


def interval(outcomes: Sequence[float]) -> tuple[float, float]:
    """Give the 95 % interval of the mean over samples."""
    return _bounds(_means(np.asarray(outcomes, dtype=float)))


def intervals(
    outcomes: Sequence[Any], measure: Callable[[Sequence[Any]], Mapping[str, float]]
) -> dict[str, tuple[float, float]]:
    """Give the 95 % interval of every number that `measure` computes of all outcomes, be it a mean or not."""
    if not measure(outcomes):
        return {}
    found: dict[str, list[float]] = {}
    for picks in _picks(len(outcomes)).tolist():
        for name, value in measure([outcomes[pick] for pick in picks]).items():
            found.setdefault(name, []).append(value)
    return {name: _bounds(np.asarray(values)) for name, values in found.items()}


def retained(
    scores: Sequence[float], full: Sequence[float], none: Sequence[float]
) -> tuple[float, tuple[float, float]] | None:
    """Give (scores - none) / (full - none) of the means over the same samples, with its 95 % interval.

    None where the full cache is not clearly above the floor.
    """
    assert len(scores) == len(full) == len(none), "only outcomes of the same samples can be compared"
    if difference(full, none).low <= 0:
        return None
    kept, all_of_it = np.subtract(scores, none), np.subtract(full, none)
    share = float(kept.mean() / all_of_it.mean())
    gains = _means(all_of_it)
    real = gains > 0  # a draw in which the full cache gains nothing has no share
    return share, _bounds(_means(kept)[real] / gains[real])


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two plans on the same samples in the same order by their paired differences."""
    assert len(first) == len(second), "only outcomes of the same samples can be paired"
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    low, high = _bounds(_means(gaps))
    return Difference(mean=float(gaps.mean()), low=low, high=high)
