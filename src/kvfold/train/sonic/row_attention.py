"""Attention of a parallel pass with Nexus rows: soft weights on what is folded, gates through which rows look ahead.

What a fold's pass computes from parts (hf/passes.py) is computed here in one product over everything, with a gradient.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kvfold.adapters.adapter import Adapter
from kvfold.train.sonic.parallel_masks import Layout

# Added to the attention score of a slot of weight 0: its softmax is an exact 0, and no number is infinite.
_HIDDEN = -1e4


class RowAttention:
    """Attends in the folding layers: tokens by their mask, rows also to the rest of their segment.

    A weight of a slot is the same for every query that stands behind its segment. So it is a dot product: a query has
    a 1 for each segment before its own, and a key has its weight at its own segment. Written as more dimensions of
    queries and keys, weights get their gradient from attention without a mask that has one, which has fast kernels.
    """

    def __init__(
        self,
        adapter: Adapter,
        layout: Layout,
        logs: Float[Tensor, "B L H all_rows"],
        layers: Sequence[int],
    ) -> None:
        """`logs` are the logarithms of how much of each slot or row later segments see, for each of `layers`."""
        self.adapter, self.count = adapter, layout.count
        visible = layout.visible()  # B NK NK
        self.visible = visible[:, None]
        self.ahead = visible[:, layout.count :].clone()
        self.ahead[..., : layout.count] |= layout.later()
        segments = torch.arange(max(int(layout.segment.max()), 1), device=logs.device)
        self.behind = segments < layout.segment[..., None]  # B NK segments
        self.inside = segments == layout.segment[..., None]
        finite = logs.clamp(min=_HIDDEN)
        self.logs = {layer: finite[:, at] for at, layer in enumerate(layers)}

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "B G all_rows D"],
        keys: Float[Tensor, "B H all_rows D"],
        values: Float[Tensor, "B H all_rows D"],
        scale: float,
    ) -> Float[Tensor, "B G all_rows D"]:
        """Attend in one layer."""
        groups = queries.shape[1] // keys.shape[1]
        queries, keys = self._with_weights(layer, queries, keys, scale)
        keys, values = (each.repeat_interleave(groups, dim=1) for each in (keys, values))
        whole = _attended(queries, keys, values, self.visible, scale)
        if whole.shape[2] == self.count:
            return whole
        ahead = _attended(queries[:, :, self.count :], keys, values, self.ahead[:, None], scale)
        without = whole[:, :, self.count :]
        gate = self.adapter.gate(layer)[:, None, None]  # G 1 1
        seen = without + gate.to(whole.dtype) * (ahead - without)
        return torch.cat([whole[:, :, : self.count], seen], dim=2)

    def _with_weights(
        self,
        layer: int,
        queries: Float[Tensor, "B G all_rows D"],
        keys: Float[Tensor, "B H all_rows D"],
        scale: float,
    ) -> tuple[Float[Tensor, "B G all_rows more"], Float[Tensor, "B H all_rows more"]]:
        """Give queries and keys a dimension for each segment, whose product is the weight over the scale."""
        behind = self.behind.to(queries.dtype)[:, None].expand(-1, queries.shape[1], -1, -1)
        weights = (self.logs[layer] / scale)[..., None] * self.inside[:, None]
        return torch.cat([queries, behind], dim=-1), torch.cat([keys, weights.to(keys.dtype)], dim=-1)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attend where `visible` is true; kernels want values as wide as keys."""
    width = values.shape[-1]
    values = pad(values, (0, keys.shape[-1] - width))
    return scaled_dot_product_attention(queries, keys, values, visible, scale=scale)[..., :width]
