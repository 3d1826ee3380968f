"""Job: one plan to run, as text, with what tables and records must know of it beforehand.

The ceiling (`full`) and the floor (`none`) are jobs like others, and part of every run. It knows no plan's meaning:
`jobs.py` makes jobs of what a user writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CEILING, FLOOR = "full", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A plan's text, the fraction that it promises to keep, and whether queries choose what it keeps."""

    plan: str
    keep: float | None
    looks_at_queries: bool = False


EDGES = (Job(plan=CEILING, keep=None), Job(plan=FLOOR, keep=None))


def with_edges(jobs: Sequence[Job]) -> list[Job]:
    """Put the ceiling and the floor in front of the jobs, each job once."""
    return list(dict.fromkeys([*EDGES, *jobs]))
