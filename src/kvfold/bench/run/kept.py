"""Samples that are finished under a plan, in a file beside the records, until the records themselves are written.

A run that was stopped or killed goes on from them, sample by sample. It knows nothing of what an outcome means.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvfold.bench.judging.notebook import Notebook, key_of
from kvfold.bench.run.provenance import git_revision, versions
from kvfold.bench.run.setting import Setting
from kvfold.bench.suite import Outcome
from kvfold.errors import FileError

FILE_NAME = "samples.jsonl"


class KeptSamples:
    """The outcomes of one setting, by plan and number of the sample. It changes: `write` adds some."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self._book = Notebook(folder / FILE_NAME)
        self._setting = setting
        self._seconds: dict[str, float] = {}
        self._made_by = [git_revision(), versions()]  # a record says one revision: samples of another do not join it

    def find(self, plan: str) -> dict[int, Outcome]:
        """Find all that were finished under a plan."""
        work, found = self._work(plan), {}
        for number in range(self._setting.n):
            entry = self._book.find(key_of(work, number))
            if entry is not None:
                found[number] = _read(entry, self._book.path)
                self._seconds[plan] = self._seconds.get(plan, 0.0) + entry["seconds"]
        return found

    def write(self, plan: str, outcomes: Mapping[int, Outcome], *, seconds: float) -> None:
        """Keep outcomes that took so long together; when this returns, they are on the disk."""
        work = self._work(plan)
        each = seconds / len(outcomes)
        self._seconds[plan] = self._seconds.get(plan, 0.0) + seconds
        for number, outcome in outcomes.items():
            words = {"work": work, "plan": plan, "sample": number, "seconds": each, "outcome": asdict(outcome)}
            self._book.write(key_of(work, number), words)

    def seconds(self, plan: str) -> float:
        """Sum the seconds that all samples of a plan took, those of earlier runs too."""
        return self._seconds.get(plan, 0.0)

    def drop(self) -> None:
        """Remove the file, if all that it holds is of this setting; the records have it now."""
        works = {self._work(plan) for plan in self._seconds}
        if self._book.values("work") <= works:
            self._book.path.unlink(missing_ok=True)

    def _work(self, plan: str) -> str:
        return key_of(self._setting.work(plan), *self._made_by)


def _read(entry: Mapping[str, Any], path: Path) -> Outcome:
    try:
        return Outcome(**entry["outcome"])
    except TypeError:
        raise FileError(
            f"{path} was read for finished samples; it was written by another version of kvfold; remove it"
        ) from None
