"""Clock: how long a run may take, whether there is room for more, and how long the rest will take.

It learns from what was done: a step is expected to take as long as the longest one so far. It knows no suite and no
plan.
"""

from time import monotonic

FINISHING = 0.02  # share of the time allowed that is kept for intervals, records and tables
FINISHING_SECONDS = 2.0  # and as much besides


class Clock:
    """It changes: every step is noted."""

    def __init__(self, minutes: float | None = None) -> None:
        """Begin now; None sets no limit."""
        self._began = monotonic()
        limit = None if minutes is None else 60 * minutes * (1 - FINISHING) - FINISHING_SECONDS
        self.deadline = None if limit is None else self._began + limit
        self._longest = 0.0  # seconds of a step
        self._widest = 0  # samples of a step
        self._seconds = 0.0
        self._done = 0

    @property
    def left(self) -> float | None:
        """The seconds until the deadline, at least 0; None: there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - monotonic())

    def has_room(self, samples: int) -> bool:
        """Say whether a step of so many samples would end in time, by what earlier steps took."""
        left = self.left
        if left is None:
            return True
        wider = max(1.0, samples / self._widest) if self._widest else 1.0
        return left > self._longest * wider

    def note(self, samples: int, seconds: float) -> None:
        """Note a step."""
        self._longest = max(self._longest, seconds)
        self._widest = max(self._widest, samples)
        self._seconds += seconds
        self._done += samples

    def estimate(self, samples: int) -> float:
        """Estimate the seconds that so many more take, each at the mean pace so far."""
        return self._seconds / self._done * samples if self._done else 0.0
