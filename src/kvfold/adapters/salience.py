"""What each slot of a segment is worth to later turns, read off the keys and values that its layers remember.

Three small convolutions over the tokens say for each layer and head how much a token will be missed; the answer is a
rank among all slots of training, so that "the best fifth" is a threshold. In the spirit of KVzap and Fast KVzip
(https://arxiv.org/abs/2505.23416), which foretell KVzip's scores.
Ours differs: learned from what real replies lose without a slot, read from keys before their rotation and values, one
ranking for all layers and heads.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

WIDTH, TAPS, STEPS = 128, 5, (1, 2, 4)  # channels, tokens that a convolution reads, and how far these are apart
_LEVELS = 1025


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What is read of a token: its values in the folding layers, and its keys where their rotation can be undone."""

    layers: int  # that fold
    heads: int  # key/value heads of each
    size: int  # dimensions of a head
    keys: bool

    @property
    def numbers(self) -> int:
        """Numbers read of a token."""
        return self.layers * self.heads * self.size * (2 if self.keys else 1)


class Salience(nn.Module):
    """A score for each token in each layer and head, and what share of all slots score lower."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads, self.shape = reads, (reads.layers, reads.heads)
        self.mean = nn.Parameter(torch.zeros(reads.numbers), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(reads.numbers), requires_grad=False)  # one over the usual spread
        sizes = ((reads.numbers, WIDTH), (WIDTH, WIDTH), (WIDTH, reads.layers * reads.heads))
        self.layers = nn.ModuleList(
            nn.Conv1d(before, after, TAPS, dilation=step, padding=TAPS // 2 * step)
            for (before, after), step in zip(sizes, STEPS, strict=True)
        )
        self.levels = nn.Parameter(torch.linspace(-1.0, 1.0, _LEVELS), requires_grad=False)  # quantiles of the score

    def forward(self, numbers: Float[Tensor, "B S numbers"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B L H S"]:
        """The score of each slot; the tokens of a row come first, without gaps."""
        first, middle, last = self.layers
        pads = ~real[:, None]
        hidden = nn.functional.gelu(first(((numbers.float() - self.mean) * self.scale).mT.masked_fill(pads, 0.0)))
        hidden = hidden.masked_fill(pads, 0.0)
        hidden = hidden + nn.functional.gelu(middle(hidden)).masked_fill(pads, 0.0)
        return last(hidden).unflatten(1, self.shape)

    @torch.no_grad()
    def worth(self, numbers: Float[Tensor, "B S numbers"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B L H S"]:
        """0 to 1 for real tokens, wherever they stand in a row: the share of training's slots that score lower."""
        order = real.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        packed = numbers.gather(1, order[..., None].expand_as(numbers))
        score = self(packed, real.gather(1, order)).contiguous()
        levels = self.levels
        rank = torch.searchsorted(levels, score).clamp(1, _LEVELS - 1)
        low, high = levels[rank - 1], levels[rank]
        inside = ((score - low) / (high - low).clamp(min=1e-6)).clamp(0.0, 1.0)
        worth = (rank - 1 + inside) / (_LEVELS - 1)
        return torch.zeros_like(score).scatter(3, order[:, None, None].expand_as(score), worth)

    @torch.no_grad()
    def measure(self, numbers: Float[Tensor, "tokens numbers"]) -> None:
        """Take the usual size of what is read from these tokens."""
        self.mean.copy_(numbers.float().mean(dim=0))
        self.scale.copy_(1 / numbers.float().std(dim=0).clamp(min=1e-3))

    @torch.no_grad()
    def calibrate(self, scores: Float[Tensor, " slots"]) -> None:
        """Make these scores the ones that ranks are counted among."""
        ordered = scores.float().sort().values
        at = torch.linspace(0, len(ordered) - 1, _LEVELS, device=scores.device).round().long()
        self.levels.copy_(ordered[at])
