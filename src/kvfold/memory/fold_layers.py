"""Folding all layers of a memory: each by itself, or all together where a method chooses jointly.

Layers that have seen nothing are left alone. A joint fold changes every layer or none. Where gaps between positions are
closed, slots and raw tails of all layers move.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.memory.compaction import pulled, slots_end
from kvfold.memory.context import ModelAccess
from kvfold.memory.fold import fold, refuse_excess
from kvfold.memory.layer import UNTIMED, Layer
from kvfold.memory.rules import Rules
from kvfold.memory.transcript import Transcript


def fold_each(
    layers: Mapping[int, Layer],
    until: int,
    transcript: Transcript,
    *,
    everything: bool,
) -> None:
    """Fold layer by layer the columns before `until`; with `everything` layers without such columns evict too."""
    for layer in layers.values():
        tail = layer.state.tail
        columns = 0 if tail is None else min(until - tail.start, tail.length)  # `until` counts fed columns
        if everything or columns > 0:  # without columns a fold may still evict
            layer.fold(transcript, columns=max(columns, 0))


def fold_jointly(
    layers: Mapping[int, Layer],
    until: int,
    transcript: Transcript,
    access: ModelAccess | None,
) -> None:
    """Fold the columns before `until` in all layers, or in none."""
    filled = {index: layer for index, layer in layers.items() if layer.state.tail is not None}  # that saw tokens
    first = next(iter(filled.values()), None)
    # Layers fold together, so their tails begin at the same column.
    columns = 0 if first is None or first.state.tail is None else until - first.state.tail.start
    if first is None or columns <= 0:
        return
    with UNTIMED if first.timer is None else first.timer("fold"), torch.inference_mode(False), torch.no_grad():
        states = fold(
            {index: layer.state for index, layer in filled.items()},
            {index: layer.rules for index, layer in filled.items()},
            columns=columns,
            scales={index: layer.scale for index, layer in filled.items() if layer.scale is not None},
            transcript=transcript,
            access=access,
        )
    # Only now, when every layer has succeeded.
    for index, state in states.items():
        layers[index].state = state


def evict_excess(layers: Mapping[int, Layer], rules: Rules, transcript: Transcript) -> None:
    """Evict what a budget no longer allows. Raises BudgetError where a method folds each segment once."""
    if rules.select.chooses_jointly:
        refuse_excess({index: layer.state for index, layer in layers.items()}, rules)
        return
    for layer in layers.values():
        layer.fold(transcript, columns=0)
    close_gaps(layers, rules)


def invalidate(layers: Mapping[int, Layer], valid: Bool[Tensor, "B fed"] | None) -> None:
    """Turn raw columns into pads where a later mask says that they are none of the row's tokens; None: all are."""
    if valid is None:
        return
    for layer in layers.values():
        tail = layer.state.tail
        if tail is not None:
            # The mask runs over all fed columns; the tail holds those from `start` on.
            layer.state = layer.state.invalidated(valid[:, tail.start : tail.start + tail.length])


def close_gaps(layers: Mapping[int, Layer], rules: Rules) -> None:
    """Move what is held together, and the raw tail behind it, in all layers or in none.

    Layers that begin their tails at different columns, as after a fold that failed, wait for the next fold.
    """
    if not rules.closes_gaps or rules.rotary is None:
        return
    states = {index: layer.state for index, layer in layers.items() if layer.state.tail is not None}
    if len({state.tail.start for state in states.values() if state.tail is not None}) != 1:
        return
    ends = slots_end(list(states.values()))
    with torch.inference_mode(False), torch.no_grad():
        closed = {index: pulled(state, ends, rules.rotary) for index, state in states.items()}
    for index, state in closed.items():
        layers[index].state = state


def raw_text(transcript: Transcript, layers: Mapping[int, Layer]) -> Transcript:
    """Drop the ids of columns that every layer has folded."""
    if transcript.ids is None:
        return transcript
    tails = [layer.state.tail for layer in layers.values()]
    return transcript.from_column(min((tail.start for tail in tails if tail is not None), default=0))
