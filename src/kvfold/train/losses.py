"""Losses over tokens that do not all count the same.

The head over the vocabulary is computed only where a weight is positive. Knows nothing of where the weights come from.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """A mean loss to differentiate, and how many of the scored replies were right."""

    mean: Tensor  # weighted mean of the cross-entropies
    right: int  # stretches of full weight in which every token was the most likely one
    scored: int  # stretches of full weight: the scored replies


def next_token_loss(
    hidden: Float[Tensor, "B Q width"],
    head: nn.Module,
    ids: Int[Tensor, "B Q"],
    weights: Float[Tensor, "B Q"],
) -> TokenLoss:
    """Cross-entropy of every next token; a weight counts the token it stands at, not the one before it."""
    # Hidden states predict the token after theirs.
    hidden, ids, weights = hidden[:, :-1], ids[:, 1:], weights[:, 1:]
    wanted = weights > 0
    logits = head(hidden[wanted]).float()
    targets, shares = ids[wanted], weights[wanted]
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    mean = (losses * shares).sum() / shares.sum().clamp_min(1e-6)
    is_right = logits.detach().argmax(-1) == targets
    scored, right = whole_replies(weights, wanted, is_right)
    return TokenLoss(mean=mean, right=right, scored=scored)


def whole_replies(
    weights: Float[Tensor, "B Q"],
    wanted: Bool[Tensor, "B Q"],
    right: Bool[Tensor, " wanted"],
) -> tuple[int, int]:
    """Count the stretches of full weight, and those in which every token is right."""
    full = weights[wanted] >= 1
    stretch = _stretches(weights >= 1)[wanted]
    scored = stretch[full].unique()
    missed = stretch[~right & full].unique()
    return len(scored), len(scored) - len(missed)


def _stretches(full: Bool[Tensor, "B Q"]) -> Int[Tensor, "B Q"]:
    """A number for every run of full weight, the same for all its tokens; token accuracy would hide wrong values."""
    follows = nn.functional.pad(full[:, :-1], (1, 0))
    starts = full & ~follows
    return starts.flatten().long().cumsum(0).view_as(full)


def quick_in_bfloat16(device: torch.device) -> bool:
    """Whether products are quicker in bfloat16 than in float32 here; processors without them emulate bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(512, 512, dtype=dtype, device=device)
        laps = []
        for _ in range(8):
            started = time.monotonic()
            _ = square @ square
            laps.append(time.monotonic() - started)
        took[dtype] = min(laps)
    return took[torch.bfloat16] < took[torch.float32]
