"""Relaxed choice: every slot stays with a weight between 0 and 1, so that a loss can push what is kept.

In use the best slots of a budget stay and the rest goes, which has no gradient. Here a slot of an earlier segment is
attended as if less of it were there: its score is lowered by the logarithm of a logistic of how far it is above the
budget's threshold, with noise, sharper as training goes on. Maddison et al., The Concrete Distribution,
https://arxiv.org/abs/1611.00712
"""

import random

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from kvfold.train.sonic.parallel_masks import NONE, Draw, Lined

_GONE = -14.0  # logarithm of the least weight
_WIDE, _SHARP = 0.1, 0.025  # width of the logistic at the start and at the end, in units of the score
_NOISE = 0.5  # of standard logistic noise, in widths


def relax(
    lined: Lined, scores: Float[Tensor, "B L H N"], *, draw: Draw, rng: random.Random, done: float
) -> Float[Tensor, "B L H N"]:
    """Logarithms of the weights of all slots, once their segment is folded by a drawn budget; `done` is 0 to 1.

    Layers and heads share a segment's budget, as in use. Tokens of the open segment and the sinks weigh 1.
    """
    width = _WIDE * (_SHARP / _WIDE) ** done
    source = torch.Generator().manual_seed(rng.getrandbits(48))
    logs = torch.zeros_like(scores)
    for row, talk in enumerate(lined.talks):
        keep, begun = draw.keep(rng), lined.sinks
        for end in talk.ends:
            length = end - begun
            slots = draw.slots(rng, keep, length) if length > 0 else length
            if slots < length:
                own = scores[row, ..., begun:end]
                logs[row, ..., begun:end] = _weights(own, slots, width, source) if slots else _GONE
            begun = max(end, begun)
    return logs


def _weights(scores: Tensor, slots: int, width: float, source: torch.Generator) -> Tensor:
    """Logarithms of the weights where `slots` a head stay on average."""
    every = scores.detach().flatten()
    gone = len(every) - slots * len(every) // scores.shape[-1]
    threshold = (every.kthvalue(gone).values + every.kthvalue(gone + 1).values) / 2
    even = torch.rand(scores.shape, generator=source).clamp(1e-4, 1 - 1e-4).to(scores.device)
    return logsigmoid((scores - threshold) / width + _NOISE * even.logit()).clamp(min=_GONE)


def relaxed_masks(
    lined: Lined, logs: Float[Tensor, "B L H N"], *, folding: list[int], layers: int, window: int | None
) -> dict[int, Float[Tensor, "B H N N"]]:
    """What is added to the scores of every layer: sliding layers see their window, whatever is kept elsewhere."""
    segment, tokens = lined.segment.to(logs.device), torch.arange(lined.ids.shape[1], device=logs.device)
    back = tokens[:, None] - tokens
    seen = ((back >= 0) & (segment[:, None] != NONE) | (back == 0))[:, None]
    later = (segment[:, None] < segment[:, :, None])[:, None]
    nothing = logs.new_zeros(())
    masks = {
        index: torch.where(later, logs[:, at][:, :, None], nothing).masked_fill(~seen, -torch.inf)
        for at, index in enumerate(folding)
    }
    sliding = [index for index in range(layers) if index not in masks]
    if sliding:
        assert window is not None, "layers that do not fold are sliding ones"
        masks |= dict.fromkeys(sliding, nothing.expand(seen.shape).masked_fill(~(seen & (back < window)), -torch.inf))
    return masks
