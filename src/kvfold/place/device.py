"""device: keep every slot on the device of the model.

Source: the model itself, https://arxiv.org/abs/1706.03762
Ours differs: nothing; it is the place of a plan that names none.
"""

from dataclasses import dataclass

from kvfold.place.base import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(Place):
    """On the model's device, all of it attended."""

    def open(self, *, pinned: int, least: int = 0) -> None:
        """Open nothing: parts stay where they are made."""
        return
