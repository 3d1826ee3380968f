"""Where the work of a run is done: tasks in, their outcomes out, in the order of the tasks.

An executor must not change results: a task is done together wherever it runs, by a worker that opened the same model
with as many threads and drew the same samples. Here are the interface, what a worker does, and the simplest executor;
`pool.py` spreads work over processes, `rays.py` over machines.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from time import perf_counter

from kvfold.bench.peers.process import PeerError
from kvfold.bench.run.clock import Clock
from kvfold.bench.run.setting import Setting
from kvfold.bench.run.task import Part, Task
from kvfold.errors import SuiteError

ATTEMPTS = 3  # at a task whose worker died, or failed for a reason that is not the user's
_SHOWN = 200  # characters of an error in another error


class Executor(ABC):
    """Does the work of a run, here or elsewhere. Open it with `with`; leaving ends its workers."""

    @abstractmethod
    def map(self, setting: Setting, tasks: Sequence[Task], clock: Clock) -> Iterator[Part]:
        """Yield what comes out of every task, first task first, as it becomes known, until the clock has no room."""

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *problem: object) -> None:  # noqa: B027
        """End the workers, if there are any."""


class InProcess(Executor):
    """One task after the other, here. An error or Ctrl-C ends it at once; a rival that fails is asked no more."""

    def map(self, setting: Setting, tasks: Sequence[Task], clock: Clock) -> Iterator[Part]:
        """Do task by task; between the plans of a task the clock is looked at too."""
        failed: set[str] = set()
        for task in tasks:
            if failed.isdisjoint(task.plans):
                for part in _parts(setting, task, clock):
                    failed |= {part.plan} if part.failure else set()
                    yield part
            if not clock.has_room(len(task.samples)):
                return


def _parts(setting: Setting, task: Task, clock: Clock) -> Iterator[Part]:
    """What comes out of a task, plan by plan, until the clock has no room."""
    steps = setting.ask_each(task.plans, task.samples)
    while clock.has_room(len(task.samples)):
        began = perf_counter()
        try:
            plan, outcomes = next(steps)
        except StopIteration:
            return
        except PeerError as error:  # rivals are asked one by one
            yield Part(plan=task.plans[0], outcomes={}, seconds=0.0, failure=error)
            return
        yield Part(plan=plan, outcomes=outcomes, seconds=perf_counter() - began)


def work(pickled: bytes, task: Task) -> list[Part]:
    """Do a worker's part: one task in a pickled setting. The first task of a setting opens the model."""
    return list(InProcess().map(_setting(pickled), [task], Clock()))


@lru_cache(maxsize=1)  # a worker has one model at a time
def _setting(pickled: bytes) -> Setting:
    return pickle.loads(pickled)


def given_up(task: Task, error: Exception) -> SuiteError:
    """Make the error for a task whose every attempt failed."""
    reason = " ".join(str(error).split())[:_SHOWN]
    return SuiteError(
        f"samples {task.samples[0]} to {task.samples[-1]} were to be asked under {'; '.join(task.plans)}; "
        f"{ATTEMPTS} attempts failed, the last with {type(error).__name__}: {reason}; "
        "run with --executor here to see where"
    )
