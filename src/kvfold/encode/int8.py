"""int8: store each number as a signed byte; a group of numbers shares one scale.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, https://arxiv.org/abs/2402.02750
Ours differs: groups run along the dimensions of one slot for keys too (KIVI's key groups run over tokens), so a slot
is written once and dropped alone; scales are float16 and counted; a Hadamard rotation before is an option.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvfold.attention.int8 import to_int8
from kvfold.attention.kernels.compiled import Kind
from kvfold.encode.base import Quantised
from kvfold.memory.kv import Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8(Quantised):
    """Symmetric, 8 bits a number and 16 bits a group."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2402.02750"
    largest: ClassVar[float] = 127 * 65504.0  # the largest code times the largest scale
    kind: ClassVar[Kind | None] = Kind.INT8
    written: ClassVar[tuple[str, ...]] = ("codes", "scales")

    def write(self, grouped: Float[Tensor, "*slots groups size"], name: str) -> dict[str, Tensor]:
        """Codes as int8 and scales as float16."""
        codes, scales = to_int8(grouped)
        return {f"{name}_codes": codes.flatten(-2), f"{name}_scales": scales}

    def read(self, payload: Payload, name: str) -> Float[Tensor, "*slots D"]:
        """Codes times scales."""
        scales = payload[f"{name}_scales"]
        grouped = payload[f"{name}_codes"].unflatten(-1, (scales.shape[-1], -1))
        return (grouped.float() * scales.float()[..., None]).flatten(-2)
