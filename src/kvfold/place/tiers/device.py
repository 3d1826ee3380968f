"""The device tier: slots lie on the model's device, in tensors of their own. Nothing is saved but the reading.

It also holds the buffer that the host tier uses: a region in a tensor. It knows no slots.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.memory.store import Region, Tier


class TensorRegion(Region):
    """A region in a tensor of its own."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def write(self, lane: int, start: int, values: Tensor) -> None:
        """A copy into the tensor."""
        self.tensor[lane, start : start + values.shape[0]] = values


class DeviceTier(Tier):
    """On the model's device: nothing is saved but the reading."""

    name: ClassVar[str] = "device"

    def region(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Region:
        """A tensor there."""
        return TensorRegion(torch.zeros(*shape, dtype=dtype, device=device))
