"""int2: store each number in 2 bits, between the smallest and the largest of its group.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, https://arxiv.org/abs/2402.02750
Ours differs: as int4 does. KIVI's groups of keys run over tokens, which two bits need more than four do.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.attention.kernels.compiled import Kind
from kvfold.encode.int4 import Int4


@dataclass(frozen=True, slots=True, kw_only=True)
class Int2(Int4):
    """Asymmetric, 2 bits a number and 32 bits a group. The head size must be a multiple of 4."""

    kind: ClassVar[Kind | None] = None  # torch reads it: the compiled kernel has no form for it
    width: ClassVar[int] = 2
