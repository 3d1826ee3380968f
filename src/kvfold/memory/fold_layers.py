"""Folding all layers of a memory: each by itself, or all together where a method chooses jointly.

Layers that have seen nothing are left alone. A joint fold changes every layer or none.
"""

from collections.abc import Mapping

import torch

from kvfold.memory.context import ModelAccess
from kvfold.memory.fold import fold
from kvfold.memory.layer import UNTIMED, Layer
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


def raw_text(transcript: Transcript, layers: Mapping[int, Layer]) -> Transcript:
    """Drop the ids of columns that every layer has folded."""
    if transcript.ids is None:
        return transcript
    tails = [layer.state.tail for layer in layers.values()]
    return transcript.from_column(min((tail.start for tail in tails if tail is not None), default=0))
