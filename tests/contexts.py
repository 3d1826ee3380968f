"""Segments, layers and memories of random tokens, for tests of the core and of methods that need no model."""

from collections.abc import Sequence

import torch

from kvfold.encode.dense import Dense
from kvfold.memory.context import FoldContext
from kvfold.memory.kv import KV
from kvfold.memory.layer import NewTokens
from kvfold.memory.recent_queries import QueryWindow
from kvfold.memory.rules import Rules
from kvfold.memory.state import LayerState
from kvfold.memory.tail import Tail
from kvfold.memory.transcript import Transcript


class SharedDense(Dense):
    """Slots as they come, where all heads of a layer must keep the same ones."""

    shared_heads = True


SIZE, GROUP, SCALE = 4, 2, 0.5  # of a head; query heads a key/value head; of the scores


def rules_of(select, *, pinned=0, layers=1, layout=None, placement=None) -> Rules:
    """Rules by which slots are stored as they come, unless a layout says otherwise."""
    return Rules(
        select=select, layout=layout or Dense(), raw=Dense(), pinned=pinned, layers=layers, placement=placement
    )


def new_tokens(real, *, heads=2, seen=None, hidden=None) -> NewTokens:
    """Random tokens for columns that are real or pads, behind `seen` tokens of each row."""
    real = torch.as_tensor(real, dtype=torch.bool)
    rows, count = real.shape
    before = torch.tensor(seen or (0,) * rows)[:, None]
    return NewTokens(
        queries=torch.randn(rows, heads * GROUP, count, SIZE),
        keys=torch.randn(rows, heads, count, SIZE),
        values=torch.randn(rows, heads, count, SIZE),
        positions=(before + real.long().cumsum(1) - 1).clamp(min=0),
        valid=None if bool(real.all()) else real,
        hidden_states=None if hidden is None else torch.randn(rows, count, hidden),
    )


def all_real(rows, count):
    """A mask of columns without a pad."""
    return torch.ones(rows, count, dtype=torch.bool)


def tail_of(real, *, heads=2) -> Tail:
    """A tail of random columns that are real or pads."""
    new = new_tokens(real, heads=heads)
    empty = Tail.empty(new.keys, new.values)
    return empty.append(new.keys, new.values, positions=new.positions, valid=new.valid)


def rectangle(rows, heads, slots, *, first=0) -> KV:
    """Random slots at the positions from `first` on."""
    shape = (rows, heads, slots)
    return KV(torch.randn(*shape, SIZE), torch.randn(*shape, SIZE), torch.arange(first, first + slots).expand(shape))


def window_of(queries, log_sum_exp, positions) -> QueryWindow:
    """Recent queries as they stand."""
    return QueryWindow(queries=queries, log_sum_exp=log_sum_exp, positions=positions.int(), width=positions.shape[1])


def context_of(select, real, *, layers=1, heads=2, columns=None, folded=None, records=None, ids=None, access=None,
               layout=None, kind=FoldContext) -> FoldContext:  # fmt: skip
    """A segment of these columns in some layers, each with `folded[layer]` and `records[layer]`, if given."""
    real = torch.as_tensor(real, dtype=torch.bool)
    states = {}
    for layer in range(layers):
        held = None if folded is None else folded[layer]
        before = 0 if held is None else max(max(row) for row in held.counts)
        states[layer] = LayerState(
            folded=held,
            tail=tail_of(real, heads=heads),
            recorded={} if records is None else records[layer],
            seen=tuple(int(count) + before for count in real.sum(dim=1)),
        )
    return kind(
        states=states,
        rules=rules_of(select, layers=layers, layout=layout),
        columns=real.shape[1] if columns is None else columns,
        scales=dict.fromkeys(states, SCALE),
        transcript=Transcript(ids=None if ids is None else torch.as_tensor(ids, dtype=torch.int32)),
        access=access,
    )


def places(kv_positions, kept, *, row=0, head=0) -> list[int]:
    """Positions that a mask keeps of one row and head."""
    return kv_positions[row, head][kept[row, head]].tolist()


def behind_a_pad(tokens: int) -> Sequence[Sequence[bool]]:
    """One row: a pad, and tokens."""
    return [[False] + [True] * tokens]
