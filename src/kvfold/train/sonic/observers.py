"""Observers of attention in training passes: what the teacher attends to, and how the student's Nexus rows are read.

`Guide` compares what later tokens read of the Nexus rows with what they would have read of the folded tokens, in value
and in weight; both, because a row of too little weight is ignored however right it is. `TeacherAttention` notes what
the salience scorer learns from. Knows nothing of losses' weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.reference import attend_part

_SHARE = 0.5  # of the folded tokens' attention weight that the Nexus rows must have
_SMALL = 1e-3  # added to the squared length of what was read, so that the relative error stays finite


@dataclass(slots=True, kw_only=True)
class Guide:
    """Adds up, layer by layer, how unlike Nexus rows and folded tokens are to later queries. It changes."""

    query_positions: Int[Tensor, "B P"]  # columns whose queries are compared
    earlier: Bool[Tensor, "B P N"]  # tokens of earlier segments
    folded: Bool[Tensor, "B L H N"]  # slots that are gone, by folding layer and head
    nexus: Bool[Tensor, "B P K"]  # Nexus rows that are seen in their place
    layers: Sequence[int]  # the folding layers
    output: list[Tensor] = field(default_factory=list)  # relative squared error of what was read, a layer each
    weight: list[Tensor] = field(default_factory=list)  # difference of the log-sum-exp
    hinge: list[Tensor] = field(default_factory=list)  # how much of the least share is missing

    def look(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Add up one layer; an observer of attention (hf/probe.py)."""
        tokens = self.earlier.shape[-1]
        chosen = _at(queries, self.query_positions)
        gone = self._gone(layer, queries.shape[1])
        replaced = self.earlier[:, None] & gone[:, :, None]  # B G P N
        with torch.no_grad():
            wanted, wanted_mass = attend_part(
                chosen,
                keys[:, :, :tokens],
                values[:, :, :tokens],
                scale=scale,
                mask=replaced,
            )
        found, found_mass = attend_part(
            chosen.detach(),
            keys[:, :, tokens:],
            values[:, :, tokens:],
            scale=scale,
            mask=self.nexus[:, None],
        )
        self._add(wanted.float(), wanted_mass, found.float(), found_mass)

    def _gone(self, layer: int, heads: int) -> Bool[Tensor, "B G N"]:
        """The folded slots of a layer for each of its query heads; layers may share one choice."""
        at = min(self.layers.index(layer), self.folded.shape[1] - 1)
        gone = self.folded[:, at]
        return gone.repeat_interleave(heads // gone.shape[1], dim=1)

    def _add(self, wanted: Tensor, wanted_mass: Tensor, found: Tensor, found_mass: Tensor) -> None:
        """Take in one layer's outputs [B G P D] and log-sum-exps [B G P], where a query sees both kinds of slots."""
        both = wanted_mass.isfinite() & found_mass.isfinite()
        count = both.sum().clamp(min=1)
        squared_error = ((found - wanted) ** 2).sum(-1)
        squared_length = (wanted**2).sum(-1)
        error = squared_error / (squared_length + _SMALL)
        counted_error = torch.where(both, error, 0.0)
        difference = torch.where(both, wanted_mass - found_mass, 0.0)
        # Where the Nexus rows have the larger weight nothing is missing.
        share = (-difference).clamp(max=0.0).exp()
        missing = (_SHARE - share).clamp(min=0.0)
        self.output.append(counted_error.sum() / count)
        self.weight.append(difference.abs().sum() / count)
        self.hinge.append(missing[both].sum() / count)


@dataclass(slots=True, kw_only=True)
class TeacherAttention:
    """Notes keys, values and the attention of later replies, in a pass that sees everything. It changes."""

    query_positions: Int[Tensor, "B P"]  # tokens that predict replies
    earlier: Bool[Tensor, "B P N"]  # tokens of earlier segments
    peaks: list[Tensor] = field(default_factory=list)  # [B H N] a layer: the largest attention weight of any query
    keys: list[Tensor] = field(default_factory=list)  # [B N H D] a layer, and so are the values
    values: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def look(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Note one folding layer; an observer of attention (hf/probe.py)."""
        queries, keys, values = (rows.detach() for rows in (queries, keys, values))
        self.keys.append(keys.transpose(1, 2))
        self.values.append(values.transpose(1, 2))
        self.peaks.append(self._peaks(queries, keys, scale))

    def _peaks(
        self,
        queries: Float[Tensor, "B G Q D"],
        keys: Float[Tensor, "B H N D"],
        scale: float,
    ) -> Float[Tensor, "B H N"]:
        """The largest weight that any chosen query of a later segment gives to each key."""
        chosen = _at(queries, self.query_positions).float()
        _, heads, tokens, _ = keys.shape
        grouped = chosen.unflatten(1, (heads, -1))  # B H group P D
        one_for_group = keys.float()[:, :, None]  # B H 1 N D
        scores = grouped @ one_for_group.mT * scale  # B H group P N
        columns = torch.arange(tokens, device=keys.device)
        is_later = columns > self.query_positions[..., None]  # B P N
        scores = scores.masked_fill(is_later[:, None, None], -torch.inf)
        weights = scores.softmax(dim=-1)
        by_head = weights.amax(dim=2)  # B H P N
        by_head = by_head.masked_fill(~self.earlier[:, None], 0.0)
        return by_head.amax(dim=2)


def _at(queries: Float[Tensor, "B G Q D"], positions: Int[Tensor, "B P"]) -> Float[Tensor, "B G P D"]:
    """The queries that stand at these columns of each row."""
    _, heads, _, size = queries.shape
    at = positions[:, None, :, None]
    return queries.gather(2, at.expand(-1, heads, -1, size))
