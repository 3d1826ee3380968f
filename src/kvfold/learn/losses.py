"""Losses over tokens that do not all count the same.

The head over the vocabulary is computed only where a weight is positive. Knows nothing of where the weights come from.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """A mean loss to differentiate, and how many of the scored replies were right."""

    mean: Tensor  # weighted mean of the cross-entropies
    right: int  # stretches of full weight in which every token was the most likely one
    scored: int  # stretches of full weight: the scored replies


def next_token_loss(
    hidden: Float[Tensor, "B Q width"], head: nn.Module, ids: Int[Tensor, "B Q"], weights: Float[Tensor, "B Q"]
) -> TokenLoss:
    """Cross-entropy of every next token; a weight counts its own token, not the one before it."""
    wanted = weights[:, 1:] > 0
    logits = head(hidden[:, :-1][wanted]).float()
    targets, shares = ids[:, 1:][wanted], weights[:, 1:][wanted]
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    full = shares >= 1
    stretch = _stretches(weights[:, 1:] >= 1)[wanted]
    wrong = (logits.detach().argmax(-1) != targets) & full
    scored, missed = stretch[full].unique(), stretch[wrong].unique()
    return TokenLoss(
        mean=(losses * shares).sum() / shares.sum().clamp_min(1e-6), right=len(scored) - len(missed), scored=len(scored)
    )


def _stretches(full: Bool[Tensor, "B Q"]) -> Int[Tensor, "B Q"]:
    """A number for every run of full weight, the same for all its tokens; token accuracy would hide wrong values."""
    starts = full & ~nn.functional.pad(full[:, :-1], (1, 0))
    return starts.flatten().long().cumsum(0).view_as(full)
