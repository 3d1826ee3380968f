"""What a member of the place axis is: a rule for where folded parts lie.

So far every part lies on the model's device; tiers on the host and on disk come with the first member that uses them.
"""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Place(ABC):  # noqa: B024 - what a tier must do comes with the first tier that is not the device
    """A placement of folded parts."""

    paper: ClassVar[str | None] = None
