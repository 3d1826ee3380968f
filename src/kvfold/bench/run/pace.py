"""Pace: how long a run will take, by its first samples, and when it has to end.

The estimate comes once, after the first batch; plans differ, so it is a rough one. A run that is out of time keeps
every record that is finished, and the same command goes on with the others. It knows no suite and no plan.
"""

from collections.abc import Callable
from time import perf_counter

Clock = Callable[[], float]


class OutOfTime(Exception):
    """The minutes of a run are over: what is finished stays."""


class Pace:
    """One run's time. It changes with every batch."""

    def __init__(
        self,
        *,
        minutes: float | None = None,
        say: Callable[[str], None] = lambda _: None,
        clock: Clock = perf_counter,
    ) -> None:
        self.minutes = minutes
        self.say = say
        self._clock = clock
        self._start = clock()
        self._asked = 0  # samples, over all plans
        self._wanted, self._plans = 0, 0

    def begin(self, samples: int, plans: int) -> None:
        """Start to count: so many samples in all, over so many plans."""
        self._start, self._asked, self._wanted, self._plans = self._clock(), 0, samples, plans

    def count(self, samples: int) -> None:
        """Count a batch. Raises OutOfTime where more is to do and no time is left."""
        first = self._asked == 0
        self._asked += samples
        spent = self._clock() - self._start
        left = self._wanted - self._asked
        if first and left > 0:
            whole = spent / self._asked * self._wanted
            self.say(f"about {_said(whole)} for {self._wanted} samples, {self._plans} plans in all")
        if left > 0 and self.minutes is not None and spent >= 60 * self.minutes:
            raise OutOfTime

    def stop(self, unfinished: int) -> None:
        """Say that time is over."""
        self.say(f"{self.minutes:g} minutes are over: {unfinished} plans are left; the same command goes on with them")


def _said(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
