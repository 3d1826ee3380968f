"""What a member of the encode axis is: a codec that writes and reads each slot by itself.

A codec is handed keys and values of some slots, [..., D] each, and returns named tensors with the same leading
dimensions. Because a slot stands alone, slots can be dropped later without being written again.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.cache.kv import Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Encode(ABC):
    """A codec of single slots."""

    lossless: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    @abstractmethod
    def encode(self, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> Payload:
        """What is stored of these slots: tensors with the same leading dimensions."""

    @abstractmethod
    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values again, in `dtype`."""
