"""Losses that make one forward like another: divergence over the vocabulary, and likeness of what attention reads.

The divergence is computed in chunks of tokens that are computed again for the gradient, so that memory is bounded
whatever the vocabulary. `Guide` looks on in a parallel pass: what later tokens read of the Nexus rows should be what
they would have read of the folded tokens, in value and in weight (both: a row of too little weight is ignored
however right it is). Knows nothing of data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvfold.attention.reference import attend_part

_CHUNK = 1024  # tokens whose logits are held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Sums over tokens, each times its weight."""

    kl: Float[Tensor, ""]  # of the student from the teacher
    cross_entropy: Float[Tensor, ""]  # of the student, of the true next tokens
    right: Bool[Tensor, " tokens"]  # where the true next token is the student's most likely one


def divergence(
    student: Float[Tensor, "tokens width"],
    teacher: Float[Tensor, "tokens width"],
    head: nn.Module,
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
) -> Divergence:
    """How far the student's next-token distributions are from the teacher's, and from the text."""
    kl, cross_entropy, right = student.new_zeros(()).float(), student.new_zeros(()).float(), []
    for first in range(0, len(targets), _CHUNK):
        some = slice(first, first + _CHUNK)
        own = checkpoint(_chunk, student[some], teacher[some], head, targets[some], weights[some], use_reentrant=False)
        assert own is not None
        kl, cross_entropy = kl + own[0], cross_entropy + own[1]
        right.append(own[2])
    return Divergence(kl=kl, cross_entropy=cross_entropy, right=torch.cat(right))


def _chunk(student: Tensor, teacher: Tensor, head: nn.Module, targets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    logs = head(student).float().log_softmax(dim=-1)
    with torch.no_grad():
        wanted = head(teacher).float().log_softmax(dim=-1)
    kl = (wanted.exp() * (wanted - logs)).sum(dim=-1)
    own = -logs.gather(-1, targets[:, None])[:, 0]
    return (kl * weights).sum(), (own * weights).sum(), logs.detach().argmax(dim=-1) == targets


@dataclass(slots=True, kw_only=True)
class Guide:
    """Adds up, layer by layer, how unlike Nexus rows and folded tokens are to the queries that ask. It changes."""

    asks: Int[Tensor, "B P"]  # rows whose queries are looked at
    earlier: Bool[Tensor, "B P N"]  # tokens of earlier segments
    folded: Bool[Tensor, "B L H N"]  # slots that are gone, by folding layer and head
    nexus: Bool[Tensor, "B P K"]  # Nexus rows that it sees instead
    layers: Sequence[int]  # that fold
    share: float = 0.5  # of the folded tokens' weight that the Nexus rows must have
    output: list[Tensor] = field(default_factory=list)  # relative squared error of what was read, a layer each
    weight: list[Tensor] = field(default_factory=list)  # difference of the log-sum-exp
    hinge: list[Tensor] = field(default_factory=list)  # how much of `share` is missing

    def look(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Add up one layer; an observer of attention (hf/probe.py)."""
        tokens, heads = self.earlier.shape[-1], queries.shape[1]
        gone = self.folded[:, min(self.layers.index(layer), self.folded.shape[1] - 1)]
        gone = gone.repeat_interleave(heads // gone.shape[1], dim=1)
        at = self.asks[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
        asked = queries.gather(2, at)
        with torch.no_grad():
            wanted, mass = attend_part(
                asked,
                keys[:, :, :tokens],
                values[:, :, :tokens],
                scale=scale,
                mask=self.earlier[:, None] & gone[:, :, None],
            )
        read, own = attend_part(
            asked.detach(), keys[:, :, tokens:], values[:, :, tokens:], scale=scale, mask=self.nexus[:, None]
        )
        both = mass.isfinite() & own.isfinite()
        wanted, read = wanted.float(), read.float()
        error = ((read - wanted) ** 2).sum(-1) / ((wanted**2).sum(-1) + 1e-3)
        apart = torch.where(both, mass - own, 0.0)
        count = both.sum().clamp(min=1)
        self.output.append(torch.where(both, error, 0.0).sum() / count)
        self.weight.append(apart.abs().sum() / count)
        self.hinge.append((self.share - (-apart).clamp(max=0.0).exp()).clamp(min=0.0)[both].sum() / count)


@dataclass(slots=True, kw_only=True)
class Attended:
    """Notes, in a forward with everything in sight, what every layer remembers and how much later replies look at each
    slot. It changes with every layer."""

    asks: Int[Tensor, "B P"]  # tokens that predict replies
    earlier: Bool[Tensor, "B P N"]  # tokens of earlier segments
    most: list[Tensor] = field(default_factory=list)  # [B, H, N] a layer: the largest attention weight of any ask
    keys: list[Tensor] = field(default_factory=list)  # [B, N, H, D] a layer, and so are the values
    values: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def look(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Add up one layer; an observer of attention (hf/probe.py)."""
        self.keys.append(keys.detach().transpose(1, 2))
        self.values.append(values.detach().transpose(1, 2))
        at = self.asks[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
        asked = queries.detach().gather(2, at).float().unflatten(1, (keys.shape[1], -1))
        scores = asked @ keys.detach().float()[:, :, None].mT * scale  # B H group P N
        seen = torch.arange(keys.shape[2], device=keys.device) <= self.asks[..., None]
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1).amax(dim=2)
        self.most.append(weights.masked_fill(~self.earlier[:, None], 0.0).amax(dim=2))
