"""What a member of the encode axis is: a codec that writes and reads each slot by itself.

A codec is handed keys and values of some slots, [..., D] each, and returns named tensors with the same leading
dimensions. Because a slot stands alone, slots can be dropped later without being written again.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.cache.dense import DensePart
from kvfold.cache.kv import KV, Payload
from kvfold.cache.part import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Encode(ABC):
    """A codec of single slots."""

    lossless: ClassVar[bool] = False
    together: ClassVar[bool] = False  # whether all heads of a layer must keep the same slots
    paper: ClassVar[str | None] = None

    def of_layer(self, index: int) -> "Encode":
        """The codec of one layer: itself, unless layers differ."""
        return self

    def pack(self, kv: KV, kept: Bool[Tensor, "B H S"], *, mass: Float[Tensor, "B H S"] | None = None) -> Part:
        """A part of the slots that are True: dense, each slot by itself."""
        return DensePart.of(kv, self, kept=kept, mass=mass)

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """A part from what it saved."""
        return DensePart.restored(plain, tensors, self)

    @abstractmethod
    def encode(self, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> Payload:
        """What is stored of these slots: tensors with the same leading dimensions."""

    @abstractmethod
    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values again, in `dtype`."""
