"""Where the work of a plan is done: batches of samples in, their outcomes out, in the order of the batches.

An executor must not change results: a batch is asked together wherever it runs, by a worker that opened the same model
with as many threads and drew the same samples. Here are the interface, what a worker does, and the simplest executor;
`pool.py` spreads work over processes, `rays.py` over machines.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache

from kvfold.bench.run.setting import Setting
from kvfold.bench.suite import Outcome
from kvfold.errors import SuiteError

ATTEMPTS = 3  # at a batch whose worker died, or failed for a reason that is not the user's
_SHOWN = 200  # characters of an error in another error


class Executor(ABC):
    """Does the work of one plan, here or elsewhere. Open it with `with`; leaving ends its workers."""

    @abstractmethod
    def map(self, setting: Setting, plan: str, batches: Sequence[range]) -> Iterator[list[Outcome]]:
        """Yield the outcomes of every batch, first batch first, as they become known."""

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *problem: object) -> None:  # noqa: B027
        """End the workers, if there are any."""


class InProcess(Executor):
    """One batch after the other, here. An error or Ctrl-C ends it at once."""

    def map(self, setting: Setting, plan: str, batches: Sequence[range]) -> Iterator[list[Outcome]]:
        """Ask batch by batch."""
        for batch in batches:
            yield setting.ask(plan, batch)


def work(pickled: bytes, plan: str, batch: range) -> list[Outcome]:
    """Do a worker's part: ask one batch in a pickled setting. The first batch of a setting opens the model."""
    return _setting(pickled).ask(plan, batch)


@lru_cache(maxsize=1)  # a worker has one model at a time
def _setting(pickled: bytes) -> Setting:
    return pickle.loads(pickled)


def given_up(plan: str, batch: range, error: Exception) -> SuiteError:
    """Make the error for a batch whose every attempt failed."""
    reason = " ".join(str(error).split())[:_SHOWN]
    return SuiteError(
        f"samples {batch.start} to {batch.stop} were to be asked under {plan}; {ATTEMPTS} attempts failed, the last "
        f"with {type(error).__name__}: {reason}; run with --executor here to see where"
    )
