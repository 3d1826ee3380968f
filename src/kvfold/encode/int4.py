"""int4: store each number in 4 bits, between the smallest and the largest of its group.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, https://arxiv.org/abs/2402.02750
Ours differs: groups run along the dimensions of one slot for keys too (KIVI's key groups run over tokens), so a slot
is written once and dropped alone; lows and steps are float16 and counted; a Hadamard rotation before is an option.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.attention.kernels.compiled import Kind
from kvfold.encode.base import Quantised
from kvfold.memory.kv import Payload

_LEVELS = 15
_SMALLEST_STEP = 6e-8  # float16's smallest number: a constant group stays constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4(Quantised):
    """Asymmetric, 4 bits a number and 32 bits a group. The head size must be even."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2402.02750"
    kind: ClassVar[Kind | None] = Kind.INT4
    written: ClassVar[tuple[str, ...]] = ("codes", "steps", "lows")

    def write(self, grouped: Float[Tensor, "*slots groups size"], name: str) -> dict[str, Tensor]:
        """Packed codes as uint8, lows and steps as float16."""
        low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
        lows = low.to(torch.float16)
        steps = ((high - lows.float()) / _LEVELS).clamp(min=_SMALLEST_STEP).to(torch.float16)
        codes = ((grouped - lows.float()[..., None]) / steps.float()[..., None]).round().clamp(0, _LEVELS)
        flat = codes.to(torch.uint8).flatten(-2)
        packed = flat[..., 0::2] | flat[..., 1::2] << 4
        return {f"{name}_codes": packed, f"{name}_lows": lows, f"{name}_steps": steps}

    def read(self, payload: Payload, name: str) -> Float[Tensor, "*slots D"]:
        """Low plus code times step."""
        packed = payload[f"{name}_codes"]
        codes = torch.stack([packed & _LEVELS, packed >> 4], dim=-1).flatten(-2)
        lows, steps = payload[f"{name}_lows"].float()[..., None], payload[f"{name}_steps"].float()[..., None]
        return (codes.unflatten(-1, (lows.shape[-2], -1)).float() * steps + lows).flatten(-2)
