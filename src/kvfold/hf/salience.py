"""What each token of a segment is worth to later turns, read off the values that its layers remember.

Three small convolutions over the tokens, trained to foretell the attention that later replies give; the answer
is a rank among the tokens of training, so that "the best fifth of all tokens" is a threshold. In the spirit of KVzap
and Fast KVzip (https://arxiv.org/abs/2505.23416), which foretell KVzip's scores.
Ours differs: one worth for all layers and heads, learned from the attention of real replies, read from values only.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

WIDTH, REACH = 96, 5  # channels, and tokens that a convolution sees
_LEVELS = 257


class Salience(nn.Module):
    """A score for each token of a segment, and what share of all tokens score lower."""

    def __init__(self, dimensions: int) -> None:
        """`dimensions` are the values' of all folding layers and heads together."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dimensions), requires_grad=False)  # one over the usual size of a value
        self.first = nn.Conv1d(dimensions, WIDTH, REACH, padding=REACH // 2)
        self.middle = nn.Conv1d(WIDTH, WIDTH, REACH, padding=REACH // 2)
        self.last = nn.Conv1d(WIDTH, 1, REACH, padding=REACH // 2)
        self.levels = nn.Parameter(torch.linspace(-1.0, 1.0, _LEVELS), requires_grad=False)  # quantiles of the score

    def forward(self, values: Float[Tensor, "B S dimensions"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        """The score of each token; those of a row come first, without gaps."""
        seen = (values.float() * self.scale).masked_fill(~real[..., None], 0.0).mT
        middle = nn.functional.gelu(self.first(seen)).masked_fill(~real[:, None], 0.0)
        middle = middle + nn.functional.gelu(self.middle(middle)).masked_fill(~real[:, None], 0.0)
        return self.last(middle)[:, 0]

    @torch.no_grad()
    def worth(self, values: Float[Tensor, "B S dimensions"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        """0 to 1 for real tokens, wherever they stand in a row: the share of training's tokens that score lower."""
        order = real.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        packed = values.gather(1, order[..., None].expand_as(values))
        score = self(packed, real.gather(1, order))
        levels = self.levels
        rank = torch.searchsorted(levels, score.contiguous()).clamp(1, _LEVELS - 1)
        low, high = levels[rank - 1], levels[rank]
        inside = ((score - low) / (high - low).clamp(min=1e-6)).clamp(0.0, 1.0)
        return torch.zeros_like(score).scatter(1, order, (rank - 1 + inside) / (_LEVELS - 1))

    @torch.no_grad()
    def calibrate(self, scores: Float[Tensor, " tokens"]) -> None:
        """Make these scores the ones that ranks are counted among."""
        self.levels.copy_(scores.float().quantile(torch.linspace(0.0, 1.0, _LEVELS, device=scores.device)))
