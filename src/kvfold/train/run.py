"""A training run: what base, SONIC and DynaKV training share around the loop.

A run draws batches, trains to the end of its length, writes a record every few steps and checkpoints as time goes by,
and resumes from the last one. Each kind of training says what its batches, its record and its result are. With several
processes the first one writes the files.
"""

import abc
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.train.interrupt import noted_interrupt
from kvfold.train.loop import Trainer, refuse_missing

RECORD_EVERY = 25  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What every kind of training is given."""

    out: Path  # the folder of checkpoint, record and result
    data: Path | None = None  # real text to mix in; without it only generated text is learnt
    seed: int = 0  # of weights, data and order
    resume: bool = False  # whether the run goes on from its checkpoint
    save_every_seconds: float = 180.0  # between checkpoints


class Run(abc.ABC):
    """One training run, made by its subclass with all that it needs; `train` changes it, `finish` writes its result."""

    settings: RunSettings
    trainer: Trainer
    rng: random.Random  # of the data

    def __init__(self, settings: RunSettings, *, rank: int = 0) -> None:
        """`rank` counts the processes of the run. Raises FileError where there is no checkpoint to resume from."""
        self.settings, self.rank = settings, rank
        self._has_reported = False
        if settings.resume:
            refuse_missing(self.checkpoint)

    @abc.abstractmethod
    def batches(self) -> Iterator[Any]:
        """Batches without end."""

    @abc.abstractmethod
    def learned(self, batch: Any, loss: Any) -> None:
        """Take note of a batch and its loss."""

    @abc.abstractmethod
    def findings(self) -> dict[str, Any]:
        """What the record says of this kind of training."""

    @abc.abstractmethod
    def state(self) -> dict:
        """What the checkpoint holds besides weights, optimisers, counters and the random state of the data."""

    @abc.abstractmethod
    def restore(self, state: dict) -> None:
        """Take up what `state` gave."""

    @abc.abstractmethod
    def finish(self) -> Any:
        """Write the result of the run."""

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's file."""
        return self.settings.out / "checkpoint.pt"

    def train(self, report: Callable[[dict], None]) -> None:
        """Train to the end; `report` gets a record every 25 steps, and the same line goes to record.jsonl."""
        with noted_interrupt() as is_interrupted:
            self._loop(report, is_interrupted)
        if self.rank == 0:
            self.save()
        self._report(report)

    def _loop(self, report: Callable[[dict], None], is_interrupted: Callable[[], bool]) -> None:
        """Step by step to the end. Raises KeyboardInterrupt after a checkpoint where Ctrl-C was pressed."""
        batches = self.batches()
        saved = time.monotonic()
        while self.trainer.share < 1:
            self.trainer.step(batches, self.learned)
            if self.trainer.share < 1 and self.trainer.progress.step % RECORD_EVERY == 0:
                self._report(report)
            is_late = time.monotonic() - saved > self.settings.save_every_seconds
            if self.rank == 0 and (is_late or is_interrupted()):
                self.save()
                saved = time.monotonic()
            if is_interrupted():
                raise KeyboardInterrupt

    def record(self) -> dict[str, Any]:
        """Where the run stands, as one JSON line."""
        progress = self.trainer.progress
        counts = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "share": round(self.trainer.share, 4),
        }
        return counts | self.findings()

    def save(self) -> None:
        """Write the checkpoint."""
        self.trainer.save(self.checkpoint, rng=self.rng, more=self.state())

    def resume(self) -> None:
        """Take up the checkpoint."""
        self.restore(self.trainer.resume(self.checkpoint, rng=self.rng))
        if self.rank:
            # The checkpoint holds the first process's random state, and every process draws different samples.
            self.rng.seed(f"{self.settings.seed}:{self.rank}:{self.trainer.progress.step}")

    def _report(self, report: Callable[[dict], None]) -> None:
        record = self.record()
        if self.rank == 0:
            path = self.settings.out / "record.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            goes_on = self._has_reported or self.settings.resume
            with path.open("a" if goes_on else "w", encoding="utf-8") as lines:  # no lines of another run
                lines.write(json.dumps(record) + "\n")
            self._has_reported = True
        report(record)
