"""Where the work of a plan is done: spans of samples in, their outcomes out, in the order of the spans.

An executor must not change results: a span is asked together wherever it runs, by a worker that opened the same model
with as many threads and drew the same samples. Here are the interface, what a worker does, and the simplest executor;
`pool.py` spreads work over processes, `rays.py` over machines.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache

from kvfold.bench.run.setting import Setting, Span, set_up
from kvfold.bench.suite import Outcome
from kvfold.errors import SuiteError

ATTEMPTS = 3  # at a span whose worker died, or failed for a reason that is not the user's


class Executor(ABC):
    """Does the work of one plan, here or elsewhere. Open it with `with`; leaving ends its workers."""

    @abstractmethod
    def map(self, setting: Setting, plan: str, spans: Sequence[Span]) -> Iterator[list[Outcome]]:
        """The outcomes of every span, first span first, as they become known."""

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *problem: object) -> None:  # noqa: B027
        """End the workers, if there are any."""


class InProcess(Executor):
    """One span after the other, here. An error or Ctrl-C ends it at once."""

    def map(self, setting: Setting, plan: str, spans: Sequence[Span]) -> Iterator[list[Outcome]]:
        """Ask span by span."""
        for span in spans:
            yield setting.ask(plan, span)


def work(order: bytes, plan: str, span: Span) -> list[Outcome]:
    """What a worker does with one span; the first one of an order opens the model."""
    return _setting(order).ask(plan, span)


@lru_cache(maxsize=1)
def _setting(order: bytes) -> Setting:
    return set_up(pickle.loads(order))


def given_up(plan: str, span: Span, error: Exception) -> SuiteError:
    """What to say when every attempt at a span failed."""
    said = " ".join(str(error).split())[:200]
    return SuiteError(
        f"samples {span.start} to {span.stop} were to be asked under {plan}; {ATTEMPTS} attempts failed, the last with "
        f"{type(error).__name__}: {said}; run with --executor here to see where"
    )
