"""Task: samples that are put to a model together, and the plans under which that is done in one go; and what came out.

Tasks come sample by sample, not plan by plan: what is finished when a run stops are samples under every plan. Plans
that read alike are one task, so that they read once. It runs nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvfold.bench.ask.shared import sharers
from kvfold.bench.peers.process import PeerError
from kvfold.bench.run.setting import Setting
from kvfold.bench.suite import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The numbers of some samples, and plans."""

    plans: tuple[str, ...]
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What came out of a task under one of its plans: outcomes by the number of their sample, or a rival's failure."""

    plan: str
    outcomes: Mapping[int, Outcome]
    seconds: float
    failure: PeerError | None = None


def tasks(setting: Setting, plans: Sequence[str], is_known: Callable[[str, int], bool]) -> list[Task]:
    """List what is still to be asked, the first samples first; `is_known` of a plan and a sample: it was asked."""
    together = set(sharers(plans)) if setting.suite.shares_prefill else set()
    found = []
    for batch in setting.batches:
        missing: dict[tuple[int, ...], list[str]] = {}  # plans that lack the same samples
        for plan in plans:
            numbers = tuple(i for i in batch if not is_known(plan, i))
            missing.setdefault(numbers, []).append(plan)
        for numbers, which in missing.items():
            found += [Task(plans=team, samples=numbers) for team in _teams(which, together) if numbers]
    return found


def _teams(plans: Sequence[str], together: set[str]) -> list[tuple[str, ...]]:
    """Those that read alike, and each of the others by itself; in the order of the plans."""
    team = tuple(plan for plan in plans if plan in together)
    others = [(plan,) for plan in plans if plan not in together]
    return [team, *others] if team else others
