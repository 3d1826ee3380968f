"""The host tier: slots lie in the host's memory, pinned where the device is a GPU.

Without a GPU it differs from the device tier by name only. It knows no slots and no pages.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from kvfold.memory.store import TensorBuffer, Tier


class HostTier(Tier):
    """In the host's memory."""

    name: ClassVar[str] = "host"

    def buffer(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> TensorBuffer:
        """Make room in a tensor there."""
        return TensorBuffer(torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda"))
