"""Mean pool: replace each stretch of a segment by the means of its keys and values. A control: learning must beat it.

As compressive memories without training do, Rae et al., Compressive Transformers, https://arxiv.org/abs/1911.05507
Ours differs: keys are averaged as they are scored, after their rotation; each segment is pooled once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.memory.context import FoldContext, Row, Rows, Selection, in_all_heads
from kvfold.memory.kv import KV, positions_of_rows
from kvfold.select.base import JointSelect, stretches


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanPool(JointSelect):
    """Slots that are means of neighbouring tokens."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/1911.05507"

    def choose(self, context: FoldContext) -> Selection:
        """Pool stretches of equal length, each with a slot at its last token; a segment that fits stays as it is."""
        segment = context.segment
        kept = segment.nothing_kept()
        placed: list[list[Row]] = []
        for row, slots in enumerate(segment.slots):
            tokens = segment.tokens(row)
            if slots >= len(tokens):
                kept[row] = segment.real[row]
                placed.append([])
                continue
            ends = stretches(len(tokens), slots)
            starts = [0, *(end + 1 for end in ends)]
            spans = zip(starts, ends, strict=False)
            placed.append([(0, tokens[start], tokens[end] + 1, tokens[end]) for start, end in spans])
        rows = Rows.at(segment, placed)
        made = {}
        if bool(rows.real.any()):
            made = {
                layer: _pooled(context.keys_values(layer), _shares(context, rows), rows) for layer in context.layers
            }
        kept_of = Selection.of_layers(context.layers, kept).kept
        return Selection(kept=kept_of, made=made, made_kept=in_all_heads(made, rows.real))


def _shares(context: FoldContext, rows: Rows) -> Float[Tensor, "B 1 K S"]:
    """Give each column's share of the mean of each row: 1 over the number of tokens that the row sees, or 0."""
    real = context.segment.real
    columns = torch.arange(real.shape[1], device=real.device)
    seen = (columns >= rows.first[..., None]) & (columns < rows.stop[..., None]) & real[:, None]  # B K S
    return (seen / seen.sum(dim=-1, keepdim=True).clamp(min=1))[:, None]


def _pooled(kv: KV, shares: Float[Tensor, "B 1 K S"], rows: Rows) -> KV:
    """Average keys and values over what each row sees."""
    heads = kv.keys.shape[1]
    return KV(
        (shares @ kv.keys.float()).to(kv.keys.dtype),
        (shares @ kv.values.float()).to(kv.values.dtype),
        positions_of_rows(rows.positions, heads),
    )
