"""Whether tensors of a snapshot fit each other: shapes as the fields of a state declare them, types as a layout writes.

Snapshots come from others, and a tensor of another shape or type may be broadcast, or fail turns later. What is read
here is what the code says anyway: the shapes beside each field, and a slot that the layout packs for comparison. It
builds nothing that stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from kvfold.memory.attention_sums import AttentionSums, ReceivedAttention
from kvfold.memory.kv import KV
from kvfold.memory.part import Layout
from kvfold.memory.rules import Rules
from kvfold.memory.state import LayerState
from kvfold.memory.tail import Tail
from kvfold.memory.transcript import Transcript

_RAW: Any = Float[Tensor, "B columns"]
_ROWS: Any = Float[Tensor, "B 0"]


def refuse_misfits(state: LayerState, transcript: Transcript) -> None:
    """Raise ValueError where tensors of a layer, or of the text, have other shapes than their fields declare."""
    tail = state.tail
    if tail is None:
        return
    raw = torch.zeros(len(tail.keys), tail.length)
    with jaxtyped("context"):  # one letter is one size, in all of these
        assert isinstance(raw, _RAW)  # what records call columns are those that are raw
        _refuse_undeclared([tail, *state.records.values()])
    with jaxtyped("context"):  # the text keeps ids of columns that are raw in any layer
        assert isinstance(raw[:, :0], _ROWS)
        _refuse_undeclared([transcript])
    if transcript.classes is not None and transcript.classes.shape[1] <= transcript.length:
        raise ValueError(
            f"{transcript.length} classes are promised, and {transcript.classes.shape[1]} places are there"
        )
    sums = state.records.get(AttentionSums.name)
    folded = ((0,) * tail.keys.shape[1],) * len(state.seen) if state.folded is None else state.folded.counts
    if isinstance(sums, ReceivedAttention) and sums.counts != folded:
        raise ValueError("attention sums are of other slots than those that are folded")


def refuse_other_types(
    held: Mapping[str, Mapping[str, Tensor]],
    rules: Rules,
    tail: Tail,
) -> None:
    """Raise ValueError where a part's tensors have other names, types or sizes of a slot than its layout writes."""
    for name, layout in (("sinks", rules.raw), ("folded", rules.layout)):
        if held.get(name):
            _refuse_unlike(held[name], layout, tail)


def _refuse_unlike(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    tail: Tail,
) -> None:
    heads = tail.keys.shape[1]
    keys, values = (side.new_zeros(1, heads, 1, side.shape[-1]) for side in (tail.keys, tail.values))
    one = KV(keys, values, torch.zeros(1, heads, 1, dtype=torch.int32, device=keys.device))
    kept = torch.ones(1, heads, 1, dtype=torch.bool, device=keys.device)
    written = layout.pack(one, kept).state()[1]
    for name, like in written.items():  # a place saves more than a layout: what it needs itself
        tensor = tensors[name]
        if tensor.dtype != like.dtype or tensor.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"{name} of {list(tensor.shape)} and {tensor.dtype} is there; a slot of {list(like.shape[1:])} and "
                f"{like.dtype} is written"
            )


def refuse_undeclared(*values: Any) -> None:
    """Raise ValueError where tensors of values have other shapes than their fields declare; a letter is one size."""
    with jaxtyped("context"):
        _refuse_undeclared(values)


def _refuse_undeclared(values: Sequence[Any]) -> None:
    """Do so within the sizes that the letters have already."""
    for value in values:
        for field in fields(value):
            tensor = getattr(value, field.name)
            declared: Any = field.type
            if isinstance(tensor, Tensor) and not isinstance(tensor, declared):
                raise ValueError(f"{field.name} of {list(tensor.shape)} and {tensor.dtype} does not fit the others")
