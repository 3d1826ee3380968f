"""SlotScorer: learned importance scores of a segment's slots, from the keys and values that its layers remember.

Three small convolutions over the tokens predict for each layer and head how much a token will be missed. The score is
a quantile among all slots of training, so that "the best fifth" is a threshold. A small model has one scorer that reads
all layers at once; in a larger one each layer has a gate of its own, which reads that layer alone. In the spirit of
KVzap and Fast KVzip (https://arxiv.org/abs/2505.23416), which predict KVzip's scores.
Ours differs: learned from what real replies lose without a slot, read from keys before their rotation and values, one
ranking for all layers and heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu

CHANNELS = 128  # of the hidden convolutions, where they read all layers
CHANNELS_OF_LAYER = 16  # of the hidden convolutions of one layer's gate
MOST_AT_ONCE = 2048  # numbers of a token that one scorer reads; beyond, each layer has its gate
TAPS = 5  # tokens that a convolution reads
DILATIONS = (1, 2, 4)  # how far these are apart, convolution by convolution
BEHIND = 0.1  # raw score by which a Nexus row stands behind its token's slot before training
_QUANTILES = 1025


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFeatures:
    """The numbers that describe a token: its values in the folding layers, and keys that can be turned back."""

    layers: int  # that fold
    heads: int  # key/value heads of each
    size: int  # dimensions of a head
    keys: bool  # whether keys are among them
    by_layer: bool = False  # whether a layer's numbers stand together and are read by a gate of its own

    @property
    def groups(self) -> int:
        """Count the scorers that know nothing of one another."""
        return self.layers if self.by_layer else 1

    @property
    def width(self) -> int:
        """Count the numbers of a token."""
        sides = 2 if self.keys else 1
        return self.layers * self.heads * self.size * sides


class SlotScorer(nn.Module):
    """Scores each token in each layer and head. It changes while it is trained."""

    def __init__(self, features: TokenFeatures) -> None:
        super().__init__()
        self.features = features
        self.shape = (features.layers, features.heads)
        self.mean = nn.Parameter(torch.zeros(features.width), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(features.width), requires_grad=False)  # one over the standard deviation
        first, middle, last = DILATIONS
        groups = features.groups
        hidden = CHANNELS_OF_LAYER * groups if features.by_layer else CHANNELS
        heads = features.layers * features.heads
        self.layers = nn.ModuleList(
            [
                _convolution(features.width, hidden, dilation=first, groups=groups),
                _convolution(hidden, hidden, dilation=middle, groups=groups),
                _convolution(hidden, heads, dilation=last, groups=groups),
            ]
        )
        # A Nexus row at a token has a score like the token's slot. Untrained it says nothing more, so it stands behind.
        self.rows = _convolution(hidden, heads, dilation=last, groups=groups)
        self.put_rows_behind()
        levels = torch.linspace(-1.0, 1.0, _QUANTILES)
        self.levels = nn.Parameter(levels, requires_grad=False)  # the quantiles of raw scores in training

    @torch.no_grad()
    def put_rows_behind(self) -> None:
        """Score each Nexus row as its token's slot, less a margin."""
        last: Any = self.layers[-1]
        self.rows.load_state_dict(last.state_dict())
        assert self.rows.bias is not None
        self.rows.bias -= BEHIND

    def forward(
        self,
        features: Float[Tensor, "B S features"],
        real: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "kinds B L H S"]:
        """Give raw scores of all slots, and of Nexus rows at their tokens; a row's tokens come first, without gaps."""
        first, middle, last = self.layers
        pads = None if bool(real.all()) else ~real[:, None]  # B 1 S
        normed = features.float() - self.mean
        normed *= self.scale
        # B features S: convolutions run along the last.
        normed = _without(pads, normed.mT)
        hidden = gelu(first(normed))
        hidden = _without(pads, hidden)
        change = gelu(middle(hidden))
        change = _without(pads, change)
        seen = hidden + change
        both = torch.stack([last(seen), self.rows(seen)])
        return both.unflatten(2, self.shape)

    @torch.no_grad()
    def score(
        self,
        features: Float[Tensor, "B S features"],
        real: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "kinds B L H S"]:
        """Score real tokens, wherever they stand in a row, from 0 to 1: the share of training's slots that score less.

        The first kind are tokens' slots, the second Nexus rows at these tokens. Pads get numbers that mean nothing.
        """
        order = None
        span = _span(real)
        if span is not None:
            raw = self(features[:, span], real[:, span])
        else:
            order = real.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # B S: real tokens first
            packed = features.gather(1, order[..., None].expand_as(features))
            raw = self(packed, real.gather(1, order))
        raw = raw.contiguous()
        upper = torch.searchsorted(self.levels, raw).clamp(1, _QUANTILES - 1)  # the level at or above each raw score
        low = self.levels[upper - 1]
        high = self.levels[upper]
        between = (raw - low) / (high - low).clamp(min=1e-6)
        between = between.clamp(0.0, 1.0)
        quantile = (upper - 1 + between) / (_QUANTILES - 1)
        if order is None:
            found = raw.new_zeros(*raw.shape[:-1], real.shape[1])
            found[..., span] = quantile
            return found
        back = order[:, None, None].expand_as(raw)  # where each packed token stood
        return torch.zeros_like(raw).scatter(4, back, quantile)

    @torch.no_grad()
    def measure(self, features: Float[Tensor, "tokens features"]) -> None:
        """Take mean and standard deviation of the features from these tokens."""
        spread = features.float().std(dim=0).clamp(min=1e-3)
        self.mean.copy_(features.float().mean(dim=0))
        self.scale.copy_(1 / spread)

    @torch.no_grad()
    def calibrate(self, scores: Float[Tensor, " slots"]) -> None:
        """Make these raw scores the ones among which quantiles are counted."""
        ordered = scores.float().sort().values
        evenly = torch.linspace(0, len(ordered) - 1, _QUANTILES, device=scores.device)
        self.levels.copy_(ordered[evenly.round().long()])


def _span(real: Bool[Tensor, "B S"]) -> slice | None:
    """Find the columns of real tokens, where these are the same ones for all rows and lie together."""
    columns = real[:1].nonzero()[:, 1].tolist()
    if not columns or not torch.equal(real, real[:1].expand_as(real)):
        return None
    first, last = columns[0], columns[-1]
    return slice(first, last + 1) if last - first + 1 == len(columns) else None


def _without(
    pads: Bool[Tensor, "B 1 S"] | None,
    numbers: Float[Tensor, "B channels S"],
) -> Float[Tensor, "B channels S"]:
    """Zero pads before a convolution: its taps would carry them to the tokens next to them."""
    return numbers if pads is None else numbers.masked_fill(pads, 0.0)


def _convolution(channels: int, out: int, *, dilation: int, groups: int) -> nn.Conv1d:
    """Make a convolution over tokens that keeps their number."""
    return nn.Conv1d(channels, out, TAPS, dilation=dilation, padding=TAPS // 2 * dilation, groups=groups)
