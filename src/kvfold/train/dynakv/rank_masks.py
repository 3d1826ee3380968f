"""Masks over latent dimensions: which of them a slot keeps at a rate, softly or as the cache stores them.

Training needs a gradient through the choice of levels. Soft masks have one; hard ones, with the soft one's gradient,
are what is stored. Knows nothing of models.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.encode.lowrank.gate import keep_probabilities, level_bias, levels_at, threshold_for_rate


def rank_mask(
    logits: Float[Tensor, "S L"],
    dims: Sequence[int],
    left_out: Float[Tensor, "X L"],
    *,
    rate: float,
    hard_share: float,
) -> Float[Tensor, "S X"]:
    """Mask the dimensions of slots so that together they keep `rate` of them; `hard_share` of the slots hard.

    `dims` are the dimensions that each level keeps, and `left_out` says which ones it does not keep.
    """
    kept = 1 - left_out.T  # L X
    if rate >= 1:
        return kept[-1].expand(len(logits), -1)
    bias = level_bias(len(dims), logits)
    threshold = threshold_for_rate(logits.detach(), dims, rate=rate, size=dims[-1])
    conserved = _conserved(logits, dims, threshold, bias)
    chances = keep_probabilities(logits + conserved * bias)
    # The first level's dimensions are always kept, and each further level adds its dimensions by its chance.
    added = kept.diff(dim=0)
    soft = kept[0] + chances[:, 1:] @ added
    levels = levels_at(logits.detach(), threshold, bias)
    hard = kept[levels]
    with_gradient = hard + soft - soft.detach()
    if hard_share >= 1:
        return with_gradient
    is_hard = torch.rand(len(logits), 1, device=logits.device) < hard_share
    return torch.where(is_hard, with_gradient, soft)


def _conserved(
    logits: Float[Tensor, "S L"],
    dims: Sequence[int],
    threshold: float,
    bias: Float[Tensor, " L"],
) -> Float[Tensor, ""]:
    """The threshold with the gradient by which it keeps the total rate (implicit function).

    A slot can only gain what others lose. Without that every gate would ask for more and more, and the threshold would
    run after it.
    """
    pull = _pull(logits.detach(), dims, threshold, bias)
    kept = _mean_kept(logits, dims, threshold, bias)
    return threshold - (kept - kept.detach()) / pull


def _pull(
    logits: Float[Tensor, "S L"],
    dims: Sequence[int],
    threshold: float,
    bias: Float[Tensor, " L"],
) -> Float[Tensor, ""]:
    """By how many dimensions a slot's mean grows with the threshold."""
    with torch.enable_grad():
        moved = logits.new_tensor(threshold, requires_grad=True)
        kept = _mean_kept(logits, dims, moved, bias)
        (pull,) = torch.autograd.grad(kept, moved)
    return pull.clamp(min=1e-6)


def _mean_kept(
    logits: Float[Tensor, "S L"],
    dims: Sequence[int],
    threshold: float | Tensor,
    bias: Float[Tensor, " L"],
) -> Float[Tensor, ""]:
    """The dimensions that the mean slot keeps softly, beyond the first level's."""
    steps = logits.new_tensor(dims).diff()
    chances = keep_probabilities(logits + threshold * bias)
    return (chances[:, 1:] @ steps).mean()
