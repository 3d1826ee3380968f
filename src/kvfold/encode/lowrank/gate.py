"""The gate of DynaKV: from a slot's latent to how much of it is worth keeping. https://arxiv.org/abs/2603.04411

A softmax over the places where a latent may be cut, summed up from behind: the probability that a level is still kept
falls from level to level, so ranks are nested. In float32 or wider. A rate is met by one number added along the
levels, found by bisection.
Ours differs: the gate also sees what each cut leaves out, weighed by how much the loss minds; a level is buckets of
keys and values together; a slot's is where the chance falls below one half, as training sees hard masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BISECTIONS = 44  # of float32: its mantissa, and the exponents between the widest threshold and one
_WIDEST = 262144.0  # shifts beyond keep everything or nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Parameters of one layer's gate. X counts the latent dimensions of keys and values together, L the levels."""

    cost: Float[Tensor, " X"]  # how the loss grows with a dimension that is left out, per square of it
    left_out: Float[Tensor, "X L"]  # 1 where a level does not keep a dimension
    floor: Float[Tensor, ""]  # added to what is left out before its logarithm
    scale: Float[Tensor, " X"]  # typical size of a dimension
    weight: Float[Tensor, "X L"]
    linear: Float[Tensor, " L"]
    square: Float[Tensor, " L"]
    bias: Float[Tensor, " L"]

    def __post_init__(self) -> None:
        """Raise ValueError for parameters whose sizes contradict one another, as in a file from others."""
        dimensions, levels = self.left_out.shape
        sizes = {"cost": (dimensions,), "scale": (dimensions,), "floor": (), "weight": (dimensions, levels)}
        for name, tensor in self.parameters().items():
            wanted = (dimensions, levels) if name == "left_out" else sizes.get(name, (levels,))
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} of a gate has the sizes {list(tensor.shape)}, and not {list(wanted)}")

    def to(self, device: torch.device) -> "Gate":
        """Move the gate to a device."""
        moved = {name: tensor.to(device) for name, tensor in self.parameters().items()}
        return Gate(**moved)

    def parameters(self) -> dict[str, Tensor]:
        """Name the tensors of the gate."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def logits(
        self,
        keys: Float[Tensor, "*slots K"],
        values: Float[Tensor, "*slots V"],
    ) -> Float[Tensor, "*slots L"]:
        """Score each level as the last one kept, before a rate is set."""
        latent = torch.cat([keys, values], dim=-1)
        learned = {name: tensor.to(latent.dtype) for name, tensor in self.parameters().items()}
        energy = latent.square() * learned["cost"]  # slots X
        left_out = energy @ learned["left_out"] + learned["floor"]  # slots L, weighed by the loss
        lost = left_out.log()
        scaled = latent / learned["scale"]
        linear = scaled @ learned["weight"]
        squares = lost.square() * learned["square"]
        return linear + lost * learned["linear"] + squares + learned["bias"]


def keep_probabilities(logits: Float[Tensor, "*slots L"]) -> Float[Tensor, "*slots L"]:
    """Give the probability that each level is kept: 1 for the first, falling from there."""
    last = _wide(logits).softmax(dim=-1)  # the probability that a level is the last one kept
    # A level is kept where it or a later one is the last: sums from behind.
    behind = last.flip(-1).cumsum(dim=-1)
    kept = behind.flip(-1)
    # The first sum is 1 up to rounding; it is 1.
    first = torch.ones_like(kept[..., :1])
    return torch.cat([first, kept[..., 1:]], dim=-1)


def levels_at(
    logits: Float[Tensor, "*slots L"],
    threshold: float,
    bias: Float[Tensor, " L"],
) -> Int[Tensor, "*slots"]:
    """Give the last level whose probability is above one half, under a threshold."""
    moved = _wide(logits) + threshold * bias
    return _last_kept(moved.movedim(-1, 0))  # L first


def allocate_ranks(
    logits: Float[Tensor, "S L"],
    dims: Sequence[int],
    *,
    rate: float,
    size: int,
) -> Int[Tensor, " S"]:
    """Give levels of slots that together keep at most `rate` of their `size` numbers each, and nearly that."""
    if rate * size >= dims[-1]:  # every slot may keep all
        return torch.full(
            logits.shape[:1],
            len(dims) - 1,
            dtype=torch.long,
            device=logits.device,
        )
    threshold = threshold_for_rate(logits, dims, rate=rate, size=size)
    return levels_at(logits, threshold, level_bias(len(dims), logits))


def threshold_for_rate(
    logits: Float[Tensor, "*slots L"],
    dims: Sequence[int],
    *,
    rate: float,
    size: int,
) -> float:
    """Find a threshold under which as much as can be is kept, and no more than `rate` of all numbers."""
    kept_of = torch.tensor(dims, device=logits.device)  # numbers of a slot, by level
    slots = logits[..., 0].numel()
    allowed = rate * size * slots  # numbers of all slots
    different = sorted({*dims})  # two levels may cost the same
    steps = [more - less for less, more in pairwise(different)]
    spread = float(logits.amax() - logits.amin()) if logits.numel() else 0.0
    # Beyond this, every level is kept, or only the first: the bias grows by 1 / (L - 1) from level to level.
    widest = min((spread + len(dims)) * len(dims), _WIDEST)
    by_level = _wide(logits).movedim(-1, 0).contiguous()  # L slots: a level lies together in memory
    bias = level_bias(len(dims), logits)
    bias = bias.view(-1, *[1] * (logits.ndim - 1))  # L 1 ...: along the first dimension

    def kept(threshold: float) -> int:
        levels = _last_kept(by_level + threshold * bias)
        numbers = kept_of[levels]
        return int(numbers.sum())

    return largest_threshold(kept, allowed, widest=widest, least=min(steps, default=1))


def largest_threshold(
    kept: Callable[[float], float],
    allowed: float,
    *,
    widest: float = _WIDEST,
    least: float = 0.0,
) -> float:
    """Find the largest threshold within `widest` at which `kept` is at most `allowed`, by bisection.

    `kept` grows with the threshold, in steps of `least` or more: nearer to `allowed` than that, no step more fits.
    """
    low, high = -widest, widest
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = kept(middle)
        if found <= allowed:
            low = middle
        else:
            high = middle
        if 0 <= allowed - found < least:  # nothing more fits
            break
    return low  # the side that keeps no more than is allowed


def level_bias(levels: int, like: Tensor) -> Float[Tensor, " L"]:
    """Say how much of a threshold each level feels: evenly more from level to level."""
    return torch.linspace(0, 1, levels, dtype=like.dtype, device=like.device)


def _last_kept(logits: Float[Tensor, "L *slots"]) -> Int[Tensor, "*slots"]:
    """Give the last level whose probability is above one half.

    A bisection asks for it often, so exponentials are compared and probabilities are not written out.
    """
    shifted = logits - logits.amax(dim=0)
    exponentials = shifted.exp_()  # at most 1: none overflows
    behind = exponentials.flip(0).cumsum(dim=0)  # of the last level, the last two, ..., all
    likely = 2 * behind > behind[-1]  # more than half of the whole
    # Probabilities fall from level to level, so the likely levels are the first ones; their number less 1 is the last.
    return likely.sum(dim=0) - 1


def _wide(logits: Tensor) -> Tensor:
    """Widen to float32, or leave what is wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide)
