"""The gate of DynaKV: from a slot's latent to how much of it is worth keeping. https://arxiv.org/abs/2603.04411

A softmax over the places where a latent may be cut, summed up from behind: the chance that a level is still kept
falls from level to level, so ranks are nested. In float32 or wider. A rate is met by one number added along the
levels, found by halving.
Ours differs: the gate also sees what each cut leaves out, weighed by how much the loss minds; a level is buckets of
keys and values together; a slot's is where the chance falls below one half, as training sees hard masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

_HALVINGS = 44
_WIDEST = 262144.0  # shifts beyond keep everything or nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Parameters of one layer's gate. X is the dimensions of keys and values together, L the number of levels."""

    cost: Float[Tensor, " X"]  # what the loss minds of a dimension, per square of it
    left_out: Float[Tensor, "X L"]  # 1 where a level does not keep a dimension
    floor: Float[Tensor, ""]  # added to what is left out before its logarithm
    scale: Float[Tensor, " X"]  # typical size of a dimension
    weight: Float[Tensor, "X L"]
    linear: Float[Tensor, " L"]
    square: Float[Tensor, " L"]
    bias: Float[Tensor, " L"]

    def to(self, device: torch.device) -> "Gate":
        """The gate on a device."""
        return Gate(**{one.name: getattr(self, one.name).to(device) for one in fields(self)})

    def logits(self, keys: Float[Tensor, "*slots K"], values: Float[Tensor, "*slots V"]) -> Float[Tensor, "*slots L"]:
        """How likely each level is the last one kept, before a rate is set."""
        latent = torch.cat([keys, values], dim=-1)
        cost, left_out, floor, scale, weight, linear, square, bias = (
            getattr(self, one.name).to(latent.dtype) for one in fields(self)
        )
        lost = ((latent.square() * cost) @ left_out + floor).log()
        return (latent / scale) @ weight + lost * linear + lost.square() * square + bias


def keep_chances(logits: Float[Tensor, "*slots L"]) -> Float[Tensor, "*slots L"]:
    """The chance that each level is kept: 1 for the first, falling from there."""
    chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    kept = chances.flip(-1).cumsum(dim=-1).flip(-1)
    return torch.cat([torch.ones_like(kept[..., :1]), kept[..., 1:]], dim=-1)


def levels_at(logits: Float[Tensor, "*slots L"], shift: float, slope: Float[Tensor, " L"]) -> Int[Tensor, "*slots"]:
    """The last level whose chance is above one half, after the shift."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _last_kept((wide + shift * slope).movedim(-1, 0))


def _last_kept(logits: Float[Tensor, "L *slots"]) -> Int[Tensor, "*slots"]:
    """The last level whose chance is above one half; chances are not written out, for they are asked for often."""
    behind = (logits - logits.amax(dim=0)).exp_().flip(0).cumsum(dim=0)  # of the last level, the last two, all
    return (2 * behind > behind[-1]).sum(dim=0) - 1


def dealt(logits: Float[Tensor, "S L"], dims: Sequence[int], *, rate: float, size: int) -> Int[Tensor, " S"]:
    """Levels of some slots that together keep at most `rate` of their `size` numbers each, and nearly that."""
    if rate * size >= dims[-1]:
        return torch.full(logits.shape[:1], len(dims) - 1, dtype=torch.long, device=logits.device)
    return levels_at(logits, shift_for(logits, dims, rate=rate, size=size), slope_of(len(dims), logits))


def shift_for(logits: Float[Tensor, "*slots L"], dims: Sequence[int], *, rate: float, size: int) -> float:
    """A shift under which as much as can be is kept, and no more than `rate` of all numbers; found by halving."""
    slope = slope_of(len(dims), logits)
    kept_of = torch.tensor(dims, device=logits.device)
    allowed = rate * size * logits[..., 0].numel()
    least = min((more - less for less, more in pairwise(sorted({*dims}))), default=1)  # that a level more costs
    spread = float(logits.amax() - logits.amin()) if logits.numel() else 0.0
    widest = min((spread + len(dims)) * len(dims), _WIDEST)  # beyond, everything is kept, or nothing
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    by_level, steps = wide.movedim(-1, 0).contiguous(), slope.view(-1, *[1] * (logits.ndim - 1))

    def kept(shift: float) -> int:
        return int(kept_of[_last_kept(by_level + shift * steps)].sum())

    return largest_shift(kept, allowed, widest=widest, least=least)


def largest_shift(
    kept: Callable[[float], float], allowed: float, *, widest: float = _WIDEST, least: float = 0.0
) -> float:
    """The largest shift within `widest` at which `kept` is at most `allowed`, found by halving.

    `kept` grows with the shift, in steps of `least` or more: nearer to `allowed` than that, no step more fits.
    """
    low, high = -widest, widest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = kept(middle)
        low, high = (middle, high) if found <= allowed else (low, middle)
        if 0 <= allowed - found < least:
            break
    return low


def slope_of(levels: int, like: Tensor) -> Float[Tensor, " L"]:
    """How much of a shift each level feels: evenly more from level to level."""
    return torch.linspace(0, 1, levels, dtype=like.dtype, device=like.device)
