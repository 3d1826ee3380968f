"""Folding by a pass: a segment's raw tokens leave, and the new slots that a pass made of them join the folded part.

First the sinks are set apart, so that the tail is the segment and nothing else; then a pass reads it; then its keys
and values take its place. It knows layer states and tensors; who made the new slots it does not know.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.scores import max_attention_scores as attention_peak
from kvfold.errors import BudgetError
from kvfold.memory.fold import Rules, State, allowed_slots, placed_part, rest_of_window, told_part
from kvfold.memory.kv import KV
from kvfold.memory.part import Layout, Part, positions_of_rows
from kvfold.memory.request import Pass, Segment

Made = tuple[Tensor, Tensor]  # keys and values [B, H, K, D] of a pass's rows in one layer


def pin(state: State, rules: Rules) -> State:
    """The state with the first real tokens of the tail among its sinks, until each row has all its pinned tokens."""
    tail = state.tail
    assert tail is not None
    missing = torch.tensor([rules.pinned - held for held in state.pinned_of_rows], device=tail.keys.device)
    taken = tail.valid & (tail.valid.cumsum(dim=1) <= missing[:, None])
    if state.sinks is not None and not bool(taken.any()):
        return state
    length = tail.length
    part = _part(
        tail.keys[:, :, :length], tail.values[:, :, :length], tail.positions[:, :length], taken[:, None], rules.raw
    )
    sinks = part if state.sinks is None else state.sinks.extend(part)
    return replace(state, sinks=sinks, tail=tail.without(taken))


def segment_of(states: Sequence[State], rules: Rules, columns: int) -> Segment:
    """What the oldest columns of pinned states' tails hold, and how many slots of a head their budget has for them."""
    state = states[0]
    tail = state.tail
    assert tail is not None
    held = held_of_rows(states)
    real, rest = tail.valid[:, :columns], tail.valid[:, columns:].sum(dim=1).tolist()
    slots = []
    for row, count in enumerate(real.sum(dim=1).tolist()):
        seen = state.seen[row] - int(rest[row])
        allowed = allowed_slots(state, rules, seen=seen, pinned=state.pinned_of_rows[row])
        slots.append(int(count) if allowed is None else max(allowed - held[row], 0))
    return Segment(
        real=real,
        positions=tail.positions[:, :columns],
        slots=tuple(slots),
        layers=len(states),
        heads=tail.keys.shape[1],
        together=rules.codec.together,
    )


def held_of_rows(states: Sequence[State]) -> list[int]:
    """Folded slots of each row, a mean over the heads of all layers, rounded up."""
    held = []
    for counts in zip(*(state.folded_of_rows for state in states), strict=True):
        of_heads = [count for of_layer in counts for count in of_layer]
        held.append(-(-sum(of_heads) // max(len(of_heads), 1)))
    return held


def remembered(states: Sequence[State], columns: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, S, L, H, D] of the oldest columns of the tail; 0 for pads."""
    pads = ~states[0].tail.valid[:, :columns, None, None, None]  # pyright: ignore[reportOptionalMemberAccess]
    sides = []
    for name in ("keys", "values"):
        own = [getattr(state.tail, name)[:, :, :columns].transpose(1, 2) for state in states]
        sides.append(torch.stack(own, dim=2).masked_fill_(pads, 0.0))
    return sides[0], sides[1]


def looked_at(state: State, columns: int, scale: float) -> Float[Tensor, "B H S"]:
    """The most attention that the newest queries of a layer give to each of the oldest columns of its tail."""
    tail, window = state.tail, state.window
    assert tail is not None
    assert window is not None, "the layer keeps the window of queries when it is needed"
    at = tail.positions[:, None, :columns]
    seen = tail.valid[:, None, :columns] & (window.positions[..., None] >= at)  # B W S
    keys = tail.keys[:, :, :columns]
    return attention_peak(window.queries, keys, window.log_sum_exp, scale=scale, seen=seen)


def refuse_excess(states: Sequence[State], rules: Rules) -> None:
    """Refuse rules that allow less than is folded already: what a pass made of a segment cannot be made smaller."""
    state = states[0]
    if state.tail is None:
        return
    for row, held in enumerate(held_of_rows(states)):
        allowed = allowed_slots(state, rules, seen=state.seen[row], pinned=state.pinned_of_rows[row])
        if allowed is not None and held > allowed:
            raise BudgetError(
                f"a budget of {allowed} folded slots was asked for; {held} are held, and a segment is folded once; "
                f"give room for {held}, or start anew with the smaller budget"
            )


def absorb(state: State, rules: Rules, *, columns: int, request: Pass, kept: Bool[Tensor, "B H S"],
           made: Made | None) -> State:  # fmt: skip
    """The state with a pass's slots, and those of the layer that stay, in place of the oldest columns of the tail.

    None made no slot for any row.
    """
    tail = state.tail
    assert tail is not None
    keys, values = tail.keys[:, :, :columns], tail.values[:, :, :columns]
    folded = _part(keys, values, tail.positions[:, :columns], kept, rules.codec)
    if made is not None:
        folded = folded.extend(_part(*made, request.positions, request.real[:, None], rules.codec))
    if state.folded is not None:
        told = told_part(state.folded, tail, columns)
        folded = told.extend(folded) if folded.slots else told
    elif rules.placer is not None:
        folded = placed_part(folded, rules.placer, tail, columns)
    rest = tail.after(columns)
    return replace(state, folded=folded, tail=rest, window=rest_of_window(state, rest, rules))


def pooled(state: State, request: Pass) -> Made:
    """The means of what the rows of a pass see of the tail."""
    tail = state.tail
    assert tail is not None
    columns = torch.arange(tail.length, device=tail.keys.device)
    seen = (columns >= request.first[..., None]) & (columns < request.stop[..., None]) & tail.valid[:, None]  # B K S
    shares = (seen / seen.sum(dim=-1, keepdim=True).clamp(min=1))[:, None]
    keys, values = (side[:, :, : tail.length].float() for side in (tail.keys, tail.values))
    return (shares @ keys).to(tail.keys.dtype), (shares @ values).to(tail.values.dtype)


def _part(keys: Tensor, values: Tensor, positions: Tensor, taken: Bool[Tensor, "B H S"], codec: Layout) -> Part:
    """The taken columns of every row and head; one mask may serve all heads."""
    heads = keys.shape[1]
    return codec.pack(KV(keys, values, positions_of_rows(positions, heads)), taken.expand(-1, heads, -1))
