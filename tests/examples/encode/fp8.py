"""fp8: a slot's key and value as 8-bit floating point numbers, each with one scale.

An example of a codec of single slots: this file is all that it takes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.encode.base import SlotCodec
from kvfold.memory.kv import Payload

_LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_SCALE = 6e-8  # float16's smallest number: zeros stay zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8(SlotCodec):
    """Four bits of exponent and three of mantissa a number, 16 bits of scale a slot."""

    def encode(self, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> Payload:
        """Write codes as uint8, which every tensor operation knows, and scales as float16."""
        key_codes, key_scales = _write(keys)
        value_codes, value_scales = _write(values)
        return {
            "key_codes": key_codes,
            "key_scales": key_scales,
            "value_codes": value_codes,
            "value_scales": value_scales,
        }

    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Multiply codes by scales."""
        keys = _read(payload["key_codes"], payload["key_scales"])
        return keys.to(dtype), _read(payload["value_codes"], payload["value_scales"]).to(dtype)


def _write(numbers: Tensor) -> tuple[Tensor, Tensor]:
    scales = (numbers.float().abs().amax(dim=-1) / _LARGEST).clamp(min=_SMALLEST_SCALE).to(torch.float16)
    codes = (numbers.float() / scales.float()[..., None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales


def _read(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float() * scales.float()[..., None]
