"""Observer of attention in training passes: what later replies attend to with everything in sight.

`TeacherAttention` notes what the scorer learns from. Knows nothing of losses' weights.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
