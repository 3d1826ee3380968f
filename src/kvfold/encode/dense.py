"""dense: store a slot as the model gave it.

Source: the model itself, https://arxiv.org/abs/1706.03762
Ours differs: nothing; it is the identity that other codecs are held against.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.attention.kernels.compiled import Form
from kvfold.encode.base import SlotCodec
from kvfold.memory.kv import Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(SlotCodec):
    """Keys and values themselves."""

    lossless: ClassVar[bool] = True

    def encode(self, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> Payload:
        """The tensors as they are."""
        return {"keys": keys, "values": values}

    def form(self, payload: Payload) -> Form | None:
        """Describe the numbers as they came."""
        return Form.plain(payload["keys"], payload["values"])

    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The tensors as they were."""
        return payload["keys"], payload["values"]
