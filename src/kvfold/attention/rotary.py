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

Angles: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]  # positions [S] -> cosines and sines [S, rotated]
Turn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # keys [*slots, D], their positions, those to come -> keys
_SHORTEST_TABLE = 64  # positions


@dataclass(slots=True, kw_only=True)
class Rotary:
    """The rotations of one model. It changes: its table grows to the highest position that was asked for."""

    angles: Angles
    table: tuple[Tensor, Tensor] | None = field(default=None, compare=False)

    @property
    def table_bytes(self) -> int:
        """Bytes of the table."""
        if self.table is None:
            return 0
        return sum(side.nbytes for side in self.table)

    def at(self, positions: Int[Tensor, "*slots"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [*slots, rotated] in float32, the model's attention scaling included."""
        highest = -1
        if positions.numel():
            highest = int(positions.max())
        cosines, sines = self.reaching(highest, positions.device)
        index = positions.long()
        return cosines[index], sines[index]

    def reaching(self, highest: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions from 0 to beyond `highest`, [positions, rotated]."""
        needed = highest + 1
        table = self.table  # another thread may put a shorter one in its place
        if table is None or len(table[0]) < needed:
            with_room = needed + needed // 8  # an eighth more: a table that grows token by token is rarely remade
            rows = max(with_room, _SHORTEST_TABLE)
            every = torch.arange(rows, device=device)
            table = self.angles(every)
            self.table = table
        return table

    def turn(
        self,
        keys: Float[Tensor, "*slots D"],
        before: Int[Tensor, "*slots"],
        after: Int[Tensor, "*slots"],
    ) -> Float[Tensor, "*slots D"]:
        """Turn keys from some positions to others, in float32. Keys that stay are the same numbers, bit by bit."""
        moves = before != after
        if not bool(moves.any()):
            return keys
        chosen = keys[moves]  # slots D: only what moves is widened
        plain = unrotate(chosen.float(), *self.at(before[moves]))
        turned = keys.clone()
        turned[moves] = rotate(plain, *self.at(after[moves])).to(keys.dtype)
        return turned


def rotate(
    keys: Float[Tensor, "*#slots D"],
    cosines: Float[Tensor, "*#slots rotated"],
    sines: Float[Tensor, "*#slots rotated"],
) -> Float[Tensor, "*#slots D"]:
    """Rotate keys as a model does before attention. Leading dimensions broadcast."""
    rotated, rest = _split(keys, cosines.shape[-1])
    turned = rotated * cosines + _quarter_turn(rotated) * sines
    return _joined(turned, rest)


def unrotate(
    keys: Float[Tensor, "*#slots D"],
    cosines: Float[Tensor, "*#slots rotated"],
    sines: Float[Tensor, "*#slots rotated"],
) -> Float[Tensor, "*#slots D"]:
    """Undo `rotate`: the keys that it turns into these."""
    rotated, rest = _split(keys, cosines.shape[-1])
    # Cosines and sines carry the model's attention scaling, so their squares add up to its square and not to 1.
    scaling = cosines.square() + sines.square()
    turned = (rotated * cosines - _quarter_turn(rotated) * sines) / scaling
    return _joined(turned, rest)


def _split(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The dimensions that are rotated, and those after them that are not."""
    rotated = keys[..., :size]
    rest = keys[..., size:]
    return rotated, rest


def _joined(turned: Tensor, rest: Tensor) -> Tensor:
    if rest.shape[-1] == 0:
        return turned
    return torch.cat([turned, rest], dim=-1)


def _quarter_turn(keys: Tensor) -> Tensor:
    """Each pair (i, i + half) turned by 90 degrees: a model pairs dimensions across the halves, not neighbours."""
    first, second = keys.chunk(2, dim=-1)
    turned = [-second, first]
    return torch.cat(turned, dim=-1)
