"""Matched rows: the kept slots of a segment, fitted so that its queries read from them what they read from all of it.

A segment's queries are the best guess at what later text will ask of it. They are turned to positions behind it, near
ones and far ones, so that every slot lies before them; the fit itself is attention/matching.py. A row stands at its
token, and untouched it is that token's slot.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.matching import Seen, match
from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, nothing
from kvfold.attention.soft_cap import CappedScale
from kvfold.memory.context import FoldContext, Segment
from kvfold.memory.kv import KV
from kvfold.memory.step import AttentionStep
from kvfold.memory.tail import PAD

_FARTHEST = 1000  # tokens behind the segment from which its queries ask
_GOLDEN = 0.6180339887  # multiples of it fill an interval evenly, however many there are


def matched(
    context: FoldContext,
    segment: Segment,
    kept: Mapping[int, Bool[Tensor, "B H S"]],
    layer: int,
    kv: KV,
) -> KV:
    """Fit the kept slots of one layer; as they are where the model's rotation is not known or its scores are bent."""
    scale = context.scales[layer]
    window = context.spread_queries(layer)
    if window is None or type(scale) is CappedScale:
        return kv
    last = segment.positions.max(dim=1).values
    behind = last[:, None] + _offsets(window.positions)
    queries = context.moved(window.queries, window.positions, behind)
    if queries is None:
        return kv
    beside = _beside(context, layer, queries)
    fitted = KV(kv.keys.clone(), kv.values.clone(), kv.positions)
    for row, of_row in enumerate(kept[layer]):
        asked = window.positions[row] != PAD
        if bool(asked.any()):
            one = slice(row, row + 1)
            read = Partial(beside.output[one, :, asked], beside.log_sum_exp[one, :, asked])
            _fit(fitted, row, of_row, segment.real[row], queries[row][:, asked], read, scale)
    return fitted


def _fit(
    fitted: KV,
    row: int,
    kept: Bool[Tensor, "H S"],
    real: Bool[Tensor, " S"],
    queries: Float[Tensor, "G N D"],
    beside: Partial,
    scale: float,
) -> None:
    """Write the fitted slots of one row over its own, head by head. Heads that keep all or nothing stay."""
    heads = len(kept)
    asked, output, sums = (
        side.unflatten(0, (heads, -1)) for side in (queries, beside.output[0], beside.log_sum_exp[0])
    )
    for head, of_head in enumerate(kept):
        chosen = of_head[real]
        if not bool(chosen.any()) or bool(chosen.all()):
            continue
        keys = fitted.keys[row, head]
        values = fitted.values[row, head]
        seen = Seen(
            queries=asked[head].flatten(0, 1),
            keys=keys[real],
            values=values[real],
            beside=output[head].flatten(0, 1),
            log_sum_exp=sums[head].flatten(),
            scale=scale,
        )
        new_keys, new_values = match(seen, chosen)
        keys[of_head] = new_keys.to(keys.dtype)
        values[of_head] = new_values.to(values.dtype)


def _offsets(positions: Int[Tensor, "B W"]) -> Int[Tensor, " W"]:
    """Spread distances from 1 to the farthest, evenly in their logarithm."""
    places = torch.arange(positions.shape[1], device=positions.device)
    shares = places * _GOLDEN % 1.0
    return (_FARTHEST**shares).round().long()


def _beside(context: FoldContext, layer: int, queries: Float[Tensor, "B G W D"]) -> Partial:
    """Give what queries read of the sinks and of what was folded before."""
    state = context.states[layer]
    dtype = context.tail_of(layer).keys.dtype
    step = AttentionStep(queries=queries.to(dtype), scale=context.scales[layer])
    held = [part for part in (state.sinks, state.folded) if part is not None and part.slots]
    if not held:
        return nothing(queries)
    return merge([part.attend(step)[0] for part in held])
