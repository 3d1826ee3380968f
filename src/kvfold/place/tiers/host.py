"""The host tier: slots lie in the host's memory, pinned where the device is a GPU.

Without a GPU it differs from the device tier by name only. It knows no slots.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from kvfold.memory.store import Region, Tier
from kvfold.place.tiers.device import TensorRegion


class HostTier(Tier):
    """In the host's memory, pinned where the device is a GPU. Without a GPU it differs from the device by name only."""

    name: ClassVar[str] = "host"

    def region(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Region:
        """A tensor there."""
        return TensorRegion(torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda"))
