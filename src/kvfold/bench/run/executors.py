"""The executors by their names: `here`, `processes` and `ray`, and which of them a machine is best used by.

Each is imported when it is opened, so that a run in this process reads neither multiprocessing nor Ray.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from kvfold.bench.run.executor import Executor, InProcess
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Suite
from kvfold.errors import SuiteError

AUTO = "auto"
MOST_WORKERS = 4
_SMALL_BYTES = 1 << 26  # of weights: a model that answers sooner than a process starts
_SHARE = 0.5  # of the machine's memory that workers may take
_ROOM_BYTES = 3 << 30  # of a worker besides its weights: caches and libraries


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a run is spread over a machine."""

    executor: str
    workers: int
    threads: int | None = None  # of each worker; None: torch's own choice

    def over(self, suite: Suite, opened: Callable[[], Subject]) -> "Spread":
        """Choose, for `auto`, processes with few threads where they do more than one with many.

        That is so for a small model on a processor. A suite that measures time runs alone, and so do a model of which
        the memory holds one only, and a run whose threads somebody chose. Only what must know the model opens it.
        """
        if self.executor != AUTO:
            return self
        alone = Spread(executor="here", workers=1, threads=self.threads)
        if suite.is_timed or self.threads is not None:
            return alone
        subject = opened()
        cores = os.cpu_count() or 1
        weights = sum(weight.numel() * weight.element_size() for weight in subject.model.parameters())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        workers = min(cores, MOST_WORKERS, int(_SHARE * memory / (weights + _ROOM_BYTES)))
        if subject.device != "cpu" or weights < _SMALL_BYTES or workers < 2:
            return alone
        return Spread(executor="processes", workers=workers, threads=cores // workers)


def open_executor(name: str, *, workers: int) -> Executor:
    """Open the executor of that name. Raises SuiteError for a name that is none, and for a Ray that does not start."""
    if name == "here":
        return InProcess()
    if name == "processes":
        from kvfold.bench.run.pool import Pool

        return Pool(workers)
    if name == "ray":
        from kvfold.bench.run.rays import Rays

        return Rays(workers)
    raise SuiteError(f"executor {name!r} was asked for; there are auto, here, processes and ray; give one of them")
