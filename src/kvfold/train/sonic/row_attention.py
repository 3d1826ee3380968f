"""Attention of a parallel pass with Nexus rows: soft weights on what is folded, gates through which rows look ahead.

What a fold's pass computes from parts (hf/passes.py) is computed here in one product over everything, with a gradient.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfold.adapters.adapter import Adapter
from kvfold.hf.probe import kernels_for_masks, mask_of_queries


class RowAttention:
    """Attends in the folding layers: tokens by their mask, rows also to the rest of their segment."""

    def __init__(
        self,
        adapter: Adapter,
        masks: Mapping[int, Float[Tensor, "B H all_rows all_rows"]],
        later: Bool[Tensor, "B K N"],
    ) -> None:
        """`masks` are added to the scores of each layer; `later` marks the later tokens of each row's segment."""
        self.adapter, self.masks, self.later = adapter, masks, later

    def __call__(
        self,
        layer: int,
        queries: Float[Tensor, "B G all_rows D"],
        keys: Float[Tensor, "B H all_rows D"],
        values: Float[Tensor, "B H all_rows D"],
        scale: float,
    ) -> Float[Tensor, "B G all_rows D"]:
        """Attend in one layer."""
        mask = self.masks[layer]
        whole = _attended(queries, keys, values, mask, scale)
        rows, tokens = self.later.shape[1:]
        if not rows:
            return whole
        more = mask[:, :, tokens:].clone()
        more[..., :tokens] = more[..., :tokens].masked_fill(self.later[:, None], 0.0)
        ahead = _attended(queries[:, :, tokens:], keys, values, more, scale)
        without = whole[:, :, tokens:]
        gate = self.adapter.gate(layer)[:, None, None]  # G 1 1
        seen = without + gate.to(whole.dtype) * (ahead - without)
        return torch.cat([whole[:, :, :tokens], seen], dim=2)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attend with a mask for each key/value head."""
    of_queries = mask_of_queries(mask, queries)
    with kernels_for_masks(queries):
        return scaled_dot_product_attention(queries, keys, values, of_queries, scale=scale, enable_gqa=True)
