"""What a member of the place axis is: a rule for where folded parts lie.

A member is a value, like every member of a plan. Where parts lie elsewhere than where they are made, it is opened once
for each cache: files and buffers belong to what is opened, never to the plan.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kvfold.memory.part import Placer


@dataclass(frozen=True, slots=True, kw_only=True)
class Place(ABC):
    """A placement of folded parts."""

    paper: ClassVar[str | None] = None

    @abstractmethod
    def open(self, *, pinned: int) -> Placer | None:
        """What puts the parts of one cache in their places; None leaves them where they are made.

        Raises BudgetError for a budget that cannot hold what is always read, FileError for a place that cannot be.
        """
