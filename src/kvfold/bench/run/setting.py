"""The setting of a run: everything but the plan that a record's number depends on, and the work cut into spans.

It can be set up a second time, in another process or on another machine, from an `Order`; samples are drawn again
there from the same seed, so that only numbers travel. It knows no plan, no file and no executor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvfold.bench.run.record import samples_name, work_name
from kvfold.bench.subject import Subject, open_subject
from kvfold.bench.suite import Outcome, Suite
from kvfold.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Samples that are asked together: from `start` up to `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker elsewhere must know to have the same setting."""

    suite: Suite
    model: str
    fingerprint: str
    dtype: str
    device: str
    n: int
    seed: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A suite, a model, and the samples that follow from a seed."""

    suite: Suite
    subject: Subject
    n: int
    seed: int
    threads: int
    samples: Sequence[Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.suite.samples(n=self.n, seed=self.seed))

    @property
    def asked(self) -> dict[str, Any]:
        """The part of a record that names its samples."""
        return {
            "suite": self.suite.name,
            "suite_version": self.suite.version,
            "settings": dict(self.suite.settings),
            "fingerprint": self.subject.fingerprint,
            "dtype": self.subject.dtype,
            "seed": self.seed,
            "n": self.n,
        }

    def work(self, plan: str) -> str:
        """How the record of a plan will be called."""
        return work_name(samples_name(**self.asked), plan)

    @property
    def spans(self) -> list[Span]:
        """The samples in pieces of the suite's rows."""
        rows = self.suite.rows
        return [Span(start=i, stop=min(i + rows, len(self.samples))) for i in range(0, len(self.samples), rows)]

    def ask(self, plan: str, span: Span) -> list[Outcome]:
        """Put one span to the model under a plan."""
        return self.suite.ask(self.subject, plan, self.samples[span.start : span.stop])

    @property
    def order(self) -> Order:
        """What lets another process have this setting."""
        return Order(
            suite=self.suite,
            model=self.subject.name,
            fingerprint=self.subject.fingerprint,
            dtype=self.subject.dtype,
            device=self.subject.device,
            n=self.n,
            seed=self.seed,
            threads=self.threads,
        )


def set_up(order: Order) -> Setting:
    """The setting of an order, with the model opened here. Raises ModelError where its weights are others."""
    import torch

    torch.set_num_threads(order.threads)
    subject = open_subject(order.model, dtype=order.dtype, device=order.device)
    if subject.fingerprint != order.fingerprint:
        raise ModelError(
            f"a worker was to open {order.model}; it found other weights ({subject.fingerprint[:12]}, not "
            f"{order.fingerprint[:12]}); give every machine the same model"
        )
    return Setting(suite=order.suite, subject=subject, n=order.n, seed=order.seed, threads=order.threads)
