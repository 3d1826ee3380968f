"""Rotation of keys at positions (RoPE), and its exact inverse.

A cache is handed keys after rotation. A basis that is taken before it needs them turned back, and turned again when
they are read; both are done in float32 with the cosines and sines of the model itself, whatever its scaling. Only the
first dimensions of a head may be rotated. Su et al., RoFormer, https://arxiv.org/abs/2104.09864
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Angles: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]  # positions [N] -> cosines and sines [N, rotated]


@dataclass(slots=True, kw_only=True)
class Rotary:
    """The rotations of one model. It changes: its table grows to the highest position that was asked for."""

    angles: Angles
    table: tuple[Tensor, Tensor] | None = field(default=None, compare=False)

    @property
    def table_bytes(self) -> int:
        """Bytes of the table."""
        return 0 if self.table is None else sum(side.nbytes for side in self.table)

    def at(self, positions: Int[Tensor, "*slots"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [*slots, rotated] in float32, the model's attention scaling included."""
        highest = int(positions.max()) + 1 if positions.numel() else 0
        if self.table is None or self.table[0].shape[0] < highest:
            every = torch.arange(max(highest + highest // 8, 64), device=positions.device)
            self.table = self.angles(every)
        cosines, sines = self.table
        return cosines[positions.long()], sines[positions.long()]


def rotate(keys: Float[Tensor, "*#slots D"], cosines: Float[Tensor, "*#slots rotated"],
           sines: Float[Tensor, "*#slots rotated"]) -> Float[Tensor, "*#slots D"]:  # fmt: skip
    """Keys as a model turns them before attention. Leading dimensions broadcast."""
    size = cosines.shape[-1]
    turned = keys[..., :size] * cosines + _half(keys[..., :size]) * sines
    return torch.cat([turned, keys[..., size:]], dim=-1) if size < keys.shape[-1] else turned


def unrotate(keys: Float[Tensor, "*#slots D"], cosines: Float[Tensor, "*#slots rotated"],
             sines: Float[Tensor, "*#slots rotated"]) -> Float[Tensor, "*#slots D"]:  # fmt: skip
    """The keys that `rotate` turns into these."""
    size = cosines.shape[-1]
    grown = cosines.square() + sines.square()  # the square of the attention scaling
    turned = (keys[..., :size] * cosines - _half(keys[..., :size]) * sines) / grown
    return torch.cat([turned, keys[..., size:]], dim=-1) if size < keys.shape[-1] else turned


def _half(keys: Tensor) -> Tensor:
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
