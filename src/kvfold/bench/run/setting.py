"""The setting of a run: everything but the plan that a record's number depends on, and the samples cut into batches.

A setting can be sent to another process or machine. It travels without its model and its samples: the other side opens
the model of the same name, checks that the weights are the same, and draws the samples again from the seed. It knows
no plan, no file and no executor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvfold.bench.run.record import samples_name, work_name
from kvfold.bench.subject import Subject, open_subject
from kvfold.bench.suite import Outcome, Suite
from kvfold.errors import ModelError


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

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle what names the model, and not the model."""
        model = (self.subject.name, self.subject.fingerprint, self.subject.dtype, self.subject.device)
        return _opened_again, (self.suite, *model, self.n, self.seed, self.threads)

    @property
    def sample_fields(self) -> dict[str, Any]:
        """The fields of a record that name its samples."""
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
        """Name the record that a plan will have."""
        samples = samples_name(device=self.subject.device, threads=self.threads, **self.sample_fields)
        return work_name(samples, plan)

    @property
    def batches(self) -> list[range]:
        """The numbers of the samples that are asked together, in pieces of the suite's rows; few at first."""
        every, rows = len(self.samples), self.suite.rows
        first = min(self.suite.opens_with or rows, every)
        starts = [0, *range(first, rows, rows), *range(rows, every, rows)]
        starts = [start for start in starts if start < every]
        return [range(start, stop) for start, stop in zip(starts, [*starts[1:], every], strict=True)]

    def ask_each(self, plans: Sequence[str], numbers: Sequence[int]) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Put samples to the model under some plans; yield a plan and outcomes by the numbers of their samples."""
        samples = [self.samples[number] for number in numbers]
        for plan, outcomes in self.suite.ask_each(self.subject, plans, samples):
            yield plan, {numbers[i]: outcome for i, outcome in outcomes.items()}


def _opened_again(
    suite: Suite, model: str, fingerprint: str, dtype: str, device: str, n: int, seed: int, threads: int
) -> Setting:
    """Make the setting that was pickled, with the model opened here. Raises ModelError where its weights are others."""
    import torch

    torch.set_num_threads(threads)
    subject = open_subject(model, dtype=dtype, device=device)
    if subject.fingerprint != fingerprint:
        raise ModelError(
            f"a worker was to open {model}; it found other weights ({subject.fingerprint[:12]}, not "
            f"{fingerprint[:12]}); give every machine the same model"
        )
    return Setting(suite=suite, subject=subject, n=n, seed=seed, threads=threads)
