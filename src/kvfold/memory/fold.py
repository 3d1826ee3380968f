"""Folding: the oldest columns of the tail leave, and what a method keeps of them joins the folded part.

Sinks, the first real tokens of a row, are set apart first: no method ever sees them. Then the method chooses, in one
layer or in all at once; then each layer's slots are packed by the layout, put into their place, and the records follow.
States are values, so a fold that fails changes nothing.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.errors import BudgetError
from kvfold.memory.context import FoldContext, ModelAccess, Selection, mean_held_of_rows
from kvfold.memory.kv import KV, positions_of_rows
from kvfold.memory.part import Part
from kvfold.memory.recorders import FoldEvent, Record
from kvfold.memory.rules import Rules
from kvfold.memory.state import LayerState
from kvfold.memory.tail import Tail
from kvfold.memory.transcript import Transcript


def fold(
    states: Mapping[int, LayerState],
    rules: Mapping[int, Rules],
    *,
    columns: int,
    scales: Mapping[int, float],
    transcript: Transcript,
    access: ModelAccess | None = None,
) -> dict[int, LayerState]:
    """Fold the oldest `columns` of the tails of some layers: one, or all where a method chooses jointly."""
    pinned = {layer: pin(state, rules[layer], columns) for layer, state in states.items()}
    first = next(iter(rules.values()))  # layers differ in their layouts only
    context = FoldContext(
        states=pinned, rules=first, columns=columns, scales=scales, transcript=transcript, access=access
    )
    selection = first.select.choose(context)
    return {
        layer: _folded(
            state,
            rules[layer],
            layer,
            selection,
            context,
        )
        for layer, state in pinned.items()
    }


def fold_layer(
    state: LayerState,
    rules: Rules,
    layer: int,
    *,
    columns: int | None,
    scale: float,
    transcript: Transcript,
) -> LayerState:
    """Fold one layer by a method that chooses layer by layer; `columns` of None folds the whole tail."""
    tail = state.tail
    assert tail is not None
    columns = tail.length if columns is None else columns
    if not (rules.folds or tail.padded):
        # A fold changes nothing here, but gives back room that the buffers have beyond what they grow by.
        return replace(state, tail=tail.after(0)) if tail.is_loose else state
    if columns == 0 and not _can_choose_again(state, rules):
        return state
    folded = fold(  # of one layer: with a method that chooses layer by layer
        {layer: state},
        {layer: rules},
        columns=columns,
        scales={layer: scale},
        transcript=transcript,
    )
    return folded[layer]


def pin(state: LayerState, rules: Rules, columns: int) -> LayerState:
    """Set apart the first real tokens among the oldest columns, until each row has all its pinned tokens."""
    tail = state.tail
    assert tail is not None
    missing = torch.tensor([rules.pinned - held for held in state.pinned_of_rows], device=tail.keys.device)
    valid = tail.valid
    # B columns. The running count numbers a row's tokens from 1 on, so this takes its first `missing` ones.
    taken = valid & (valid.cumsum(dim=1) <= missing[:, None])
    taken[:, columns:] = False  # columns that are not folded now stay in the tail
    if state.sinks is not None and not bool(taken.any()):
        return state
    part = _packed(tail, taken[:, None], tail.length, rules)
    # Columns of sinks stay in the tail as pads: rows share columns, and may have their sinks in other ones.
    sinks = part if state.sinks is None else state.sinks.extend(part, Transcript())
    return replace(state, sinks=sinks, tail=tail.without(taken))


def refuse_excess(states: Mapping[int, LayerState], rules: Rules) -> None:
    """Refuse rules that allow less than is folded already, for a method that folds each segment once."""
    first = next(iter(states), None)
    if first is None or states[first].tail is None:
        return
    state = states[first]
    context = FoldContext(states=states, rules=rules, columns=0, scales={})
    for row, held in enumerate(mean_held_of_rows(list(states.values()))):
        allowed = context.allowed_slots(first, seen=state.seen[row], pinned=state.pinned_of_rows[row])
        if allowed is not None and held > allowed:
            raise BudgetError(
                f"a budget of {allowed} folded slots was asked for; {held} are held, and a segment is folded once; "
                f"give room for {held}, or start anew with the smaller budget"
            )


def _can_choose_again(state: LayerState, rules: Rules) -> bool:
    """Tell whether evicting without new tokens makes sense: something is folded, and what the method reads is there."""
    return state.folded is not None and (not rules.recent_queries or state.recent is not None)


def _folded(
    state: LayerState,
    rules: Rules,
    layer: int,
    selection: Selection,
    context: FoldContext,
) -> LayerState:
    """Build one layer's state after a selection: what it keeps is packed, the columns leave, the records follow."""
    tail, columns = context.tail_of(layer), context.columns
    kept = selection.kept[layer]
    segment = context.keys_values(layer)
    if selection.rewrite is not None:
        segment = selection.rewrite(layer, segment)
    fresh = rules.layout.pack(segment, kept)
    made = selection.made.get(layer)
    if made is not None:
        # New slots stand for the segment, and lie behind what was kept of it.
        fresh = fresh.extend(rules.layout.pack(made, selection.made_kept[layer]), context.transcript)
    history = selection.history.get(layer)
    if history is not None and bool(history.all()):
        history = None  # all stay: a part need not be written anew
    # Where a method chose among all that is held, it does so at the next fold again: room for more would be of no use.
    most = 0 if history is not None else context.most_slots(layer)
    rest = tail.after(columns)  # in fresh buffers, so that what left is freed
    event = FoldEvent(
        columns=columns,
        kept=kept,
        history=history,
        counts=None if state.folded is None else state.folded.counts,
        made=0 if made is None else len(made),
        tail=rest,
        next_positions=state.next_positions,
        for_select=True,
    )
    return replace(
        state,
        folded=_joined(state.folded, fresh, history, rules, context.transcript, most),
        tail=rest,
        recorded=_records(state, rules, event),
        pending=None,
    )


def _joined(
    held: Part | None,
    fresh: Part,
    history: Bool[Tensor, " slots"] | None,
    rules: Rules,
    transcript: Transcript,
    most: int,
) -> Part:
    """Append fresh slots to those held that stay; the first ones are put where the place says."""
    if held is None:
        return fresh if rules.placement is None else rules.placement.place(fresh, transcript)
    survivors = held if history is None else held.keep(history)
    return survivors.extend(fresh, transcript, most) if fresh.slots else survivors


def _records(state: LayerState, rules: Rules, event: FoldEvent) -> dict[str, Record]:
    """Let the records follow the fold; a record of which nothing is left is dropped."""
    read = rules.select_records
    # What the place alone reads is kept over a fold. Where there is no place, each record is the method's.
    followed = {
        name: record.fold(replace(event, for_select=name in read or rules.placement is None))
        for name, record in state.records.items()
    }
    return {name: record for name, record in followed.items() if record is not None}


def _packed(tail: Tail, taken: Bool[Tensor, "B 1 S"], columns: int, rules: Rules) -> Part:
    """Pack the columns that are True, as they came, the same for every head."""
    heads = tail.keys.shape[1]
    oldest = slice(0, columns)
    positions = positions_of_rows(tail.positions[:, oldest], heads)
    kv = KV(tail.keys[:, :, oldest], tail.values[:, :, oldest], positions)
    return rules.raw.pack(kv, taken.expand(-1, heads, -1))  # B H S
