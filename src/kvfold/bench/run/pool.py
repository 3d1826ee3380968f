"""Work spread over processes of this machine: each opens the model once and takes the next task when it is free.

Processes are started afresh (not forked: torch's threads do not survive a fork). A task whose process died is given to
another one; a mistake of the user's is not tried again.
"""

import multiprocessing
import pickle
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from kvfold.bench.run.clock import Clock
from kvfold.bench.run.executor import ATTEMPTS, Executor, given_up, work
from kvfold.bench.run.setting import Setting
from kvfold.bench.run.task import Part, Task
from kvfold.errors import KvfoldError

Running = Future[list[Part]]


class Pool(Executor):
    """A number of processes. It changes: a pool that lost a process is replaced by a new one."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._late = False  # the time was up while processes were at work
        self._pool = self._fresh()

    def __exit__(self, *problem: object) -> None:
        """End the processes; after an error, Ctrl-C or the end of the time what they are doing is thrown away."""
        broken = any(problem) or self._late
        self._pool.shutdown(wait=not broken, cancel_futures=True)
        for process in multiprocessing.active_children() if broken else ():
            process.terminate()

    def map(self, setting: Setting, tasks: Sequence[Task], clock: Clock) -> Iterator[Part]:
        """Give out all tasks, yield what comes out in order; a task that fails is given out again."""
        pickled = pickle.dumps(setting)
        running = [self._pool.submit(work, pickled, task) for task in tasks]
        for number, task in enumerate(tasks):
            failures: list[Exception] = []
            while not _has_result(running[number], failures, clock):
                if clock.left == 0.0:
                    self._late = True
                    return
                if len(failures) == ATTEMPTS:
                    raise given_up(task, failures[-1]) from failures[-1]
                if isinstance(failures[-1], BrokenProcessPool):
                    self._pool.shutdown(wait=False, cancel_futures=True)
                    self._pool = self._fresh()
                # A broken pool loses the later tasks too, so everything that is lost goes out again.
                for again in range(number, len(tasks)):
                    if _is_lost(running[again]):
                        running[again] = self._pool.submit(work, pickled, tasks[again])
            yield from running[number].result()

    def _fresh(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_leave_ctrl_c_to_the_parent)
        for _ in range(self._workers):
            pool.submit(_get_ready)
        return pool


def _leave_ctrl_c_to_the_parent() -> None:
    """A terminal sends Ctrl-C to every process; only the one that a person started says something about it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _get_ready() -> None:
    """Read the heavy modules while the parent still opens the model."""
    import kvfold.bench.ask.reader  # noqa: F401


def _has_result(future: Running, failures: list[Exception], clock: Clock) -> bool:
    """Wait for a task while there is time; an error that may pass is noted, a mistake of the user's is raised."""
    try:
        future.result(clock.left)
    except KvfoldError:
        raise
    except Exception as error:  # that the time is up is one too
        failures.append(error)
        return False
    return True


def _is_lost(future: Running) -> bool:
    """Whether nobody works on it any more, and nothing came out."""
    return future.cancelled() or (future.done() and future.exception() is not None)
