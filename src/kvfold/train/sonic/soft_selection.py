"""Soft selection: every slot stays with a weight between 0 and 1, so that a loss can push what is kept.

In use the best slots of a budget stay and the rest goes, which has no gradient. Here a slot of an earlier segment is
attended as if less of it were there: its attention score is lowered by the logarithm of a logistic of how far its
salience is above the budget's threshold, with noise, sharper as training goes on. Maddison et al., The Concrete
Distribution, https://arxiv.org/abs/1611.00712
"""

import random

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from kvfold.train.sonic.budgets import DrawnBudgets
from kvfold.train.sonic.talk_batch import NONE, TalkBatch

_GONE = -14.0  # logarithm of the least weight
_WIDE, _SHARP = 0.1, 0.025  # width of the logistic at the start and at the end, in units of the score
_NOISE = 0.5  # of standard logistic noise, in widths
_EDGE = 1e-4  # of the even numbers that the noise is made of, whose logit is infinite at 0 and 1


def log_weights(
    batch: TalkBatch,
    scores: Float[Tensor, "B L H N"],
    *,
    budgets: DrawnBudgets,
    rng: random.Random,
    done: float,
) -> Float[Tensor, "B L H N"]:
    """Logarithms of the weights of all slots, once their segment is folded by a drawn budget; `done` is 0 to 1.

    Layers and heads share a segment's budget, as in use. Tokens of the open segment and the sinks weigh 1.
    """
    width = _WIDE * (_SHARP / _WIDE) ** done
    source = torch.Generator().manual_seed(rng.getrandbits(48))
    logs = torch.zeros_like(scores)
    for row, talk in enumerate(batch.talks):
        keep = budgets.keep(rng)
        begun = batch.sinks
        for end in talk.ends:
            length = end - begun
            slots = budgets.slots(rng, keep, length) if length > 0 else length
            if slots < length:
                segment = scores[row, ..., begun:end]
                weights = _log_weights(segment, slots, width, source) if slots else _GONE
                logs[row, ..., begun:end] = weights
            begun = max(end, begun)
    return logs


def _log_weights(scores: Tensor, slots: int, width: float, source: torch.Generator) -> Tensor:
    """Logarithms of the weights of a segment where `slots` a head stay on average."""
    every = scores.detach().flatten()
    total = len(every)
    gone = total - slots * total // scores.shape[-1]
    below = every.kthvalue(gone).values
    above = every.kthvalue(gone + 1).values
    threshold = (below + above) / 2
    even = torch.rand(scores.shape, generator=source).clamp(_EDGE, 1 - _EDGE)
    noise = _NOISE * even.to(scores.device).logit()
    return logsigmoid((scores - threshold) / width + noise).clamp(min=_GONE)


def soft_masks(
    batch: TalkBatch,
    logs: Float[Tensor, "B L H N"],
    *,
    folding: list[int],
    layers: int,
    window: int | None,
) -> dict[int, Float[Tensor, "B H N N"]]:
    """Make the mask that is added to the attention scores of every layer; sliding layers see their whole window."""
    segment = batch.segment.to(logs.device)
    tokens = torch.arange(batch.ids.shape[1], device=logs.device)
    back = tokens[:, None] - tokens
    # A pad sees itself: a softmax over nothing would be no number.
    is_past = (back >= 0) & (segment[:, None] != NONE)
    seen = (is_past | (back == 0))[:, None]  # B 1 N N
    is_earlier = segment[:, None] < segment[:, :, None]
    is_earlier = is_earlier[:, None]
    nothing = logs.new_zeros(())
    masks = {}
    for at, index in enumerate(folding):
        weights = torch.where(is_earlier, logs[:, at][:, :, None], nothing)
        masks[index] = weights.masked_fill(~seen, -torch.inf)
    sliding = [index for index in range(layers) if index not in masks]
    if sliding:
        assert window is not None, "layers that do not fold are sliding ones"
        hidden = ~(seen & (back < window))
        in_window = nothing.expand(seen.shape).masked_fill(hidden, -torch.inf)
        masks |= dict.fromkeys(sliding, in_window)
    return masks
