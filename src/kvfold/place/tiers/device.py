"""The device tier: slots lie on the model's device, in tensors.

Nothing is saved but the reading. It knows no slots and no pages.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from kvfold.memory.store import TensorBuffer, Tier


class DeviceTier(Tier):
    """On the model's device."""

    name: ClassVar[str] = "device"

    def buffer(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> TensorBuffer:
        """Make room in a tensor there."""
        return TensorBuffer(torch.zeros(*shape, dtype=dtype, device=device))
