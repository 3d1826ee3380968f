"""What a member of the place axis is: a rule for where folded parts lie.

A member is a value, like every member of a plan. Where parts lie elsewhere than where they are made, it is opened once
for each cache: files and buffers belong to what is opened, never to the plan.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from kvfold.errors import BudgetError
from kvfold.memory.part import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Place(ABC):
    """A placement of folded parts."""

    names_files: ClassVar[tuple[str, ...]] = ()  # settings that name files, folders or adapters
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})  # older names of settings, with their names of today
    paper: ClassVar[str | None] = None

    @abstractmethod
    def open(self, *, pinned: int, least: int = 0) -> Placement | None:
        """Open the placement of one cache, whose first `pinned` tokens stay raw; None leaves parts where they are made.

        Where it reads a fraction, it reads `least` tokens in any case.

        Raises BudgetError for a budget that cannot hold the slots that are always read, and PlanError or FileError for
        a tier that cannot be opened.
        """

    def with_limit(self, limit_bytes: int) -> "Place":
        """Give the same placement with another limit of its file. Default: it has no file, which is a BudgetError."""
        raise BudgetError(
            f"limit_bytes={limit_bytes} was asked for; slots of this plan lie in no file; give a plan with "
            "sentkv(tier='disk', directory=...)"
        )
