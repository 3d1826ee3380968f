"""int8: each group of a slot's dimensions as signed bytes and one scale.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, https://arxiv.org/abs/2402.02750
Ours differs: groups run along the dimensions of one slot for keys too (KIVI's key groups run over tokens), so a slot
is written once and dropped alone; scales are float16 and counted.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.attention.int8 import to_int8
from kvfold.encode.base import SlotCodec
from kvfold.errors import PlanError
from kvfold.memory.kv import Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8(SlotCodec):
    """Symmetric, 8 bits a number and 16 bits a group."""

    group: int = 32  # dimensions that share a scale; the whole head where it does not divide the head size

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2402.02750"

    def __post_init__(self) -> None:
        check_group(self.group)

    def encode(self, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> Payload:
        """Codes as int8 and scales as float16, for keys and values."""
        key_codes, key_scales = self._write(keys)
        value_codes, value_scales = self._write(values)
        return {
            "key_codes": key_codes,
            "key_scales": key_scales,
            "value_codes": value_codes,
            "value_scales": value_scales,
        }

    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes times scales."""
        keys = _read(payload["key_codes"], payload["key_scales"], dtype)
        return keys, _read(payload["value_codes"], payload["value_scales"], dtype)

    def _write(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = to_int8(in_groups(numbers.float(), self.group))
        return codes.flatten(-2), scales


def check_group(group: int) -> None:
    """Refuse a group that cannot be."""
    if group < 1:
        raise PlanError(f"group={group} was asked for; a group has at least one dimension; give 32 or 64")


def in_groups(numbers: Float[Tensor, "*slots D"], group: int) -> Float[Tensor, "*slots groups size"]:
    """The last dimension cut into groups; one group where the size does not divide it."""
    size = numbers.shape[-1]
    return numbers.unflatten(-1, (-1, group if size % group == 0 else size))


def _read(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    grouped = codes.unflatten(-1, (scales.shape[-1], -1))
    return (grouped.float() * scales.float()[..., None]).flatten(-2).to(dtype)
