"""int4: store each number in 4 bits, between the smallest and the largest of its group.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, https://arxiv.org/abs/2402.02750
Ours differs: groups run along the dimensions of one slot for keys too (KIVI's key groups run over tokens), so a slot
is written once and dropped alone; lows and steps are float16 and counted; a Hadamard rotation before is an option.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvfold.attention.few_bits import from_few_bits, to_few_bits
from kvfold.attention.kernels.compiled import Kind
from kvfold.encode.base import Quantised
from kvfold.errors import CacheError
from kvfold.memory.kv import Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4(Quantised):
    """Asymmetric, 4 bits a number and 32 bits a group. The head size must be even."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2402.02750"
    kind: ClassVar[Kind | None] = Kind.INT4
    written: ClassVar[tuple[str, ...]] = ("codes", "steps", "lows")
    width: ClassVar[int] = 4  # bits of a number

    def write(self, grouped: Float[Tensor, "*slots groups size"], name: str) -> dict[str, Tensor]:
        """Packed codes as uint8, lows and steps as float16."""
        size = grouped.shape[-2] * grouped.shape[-1]
        share = 8 // self.width
        if size % share:
            raise CacheError(
                f"heads of {size} dimensions were to be stored in {self.width} bits; {share} numbers share a byte; "
                "fold by int8"
            )
        packed, steps, lows = to_few_bits(grouped, self.width)
        return {f"{name}_codes": packed, f"{name}_lows": lows, f"{name}_steps": steps}

    def read(self, payload: Payload, name: str) -> Float[Tensor, "*slots D"]:
        """Low plus code times step."""
        packed, steps, lows = (payload[f"{name}_{part}"] for part in self.written)
        return from_few_bits(packed, steps, lows, self.width)
