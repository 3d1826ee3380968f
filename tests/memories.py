"""Random slots, tails and new tokens, and a memory that is fed by hand: the core without any model.

What a memory answers is compared with attention over everything that was fed, which `Fed` writes out. Numbers are
random; tests start from a fixed seed.
"""

from typing import Any

import torch

from kvfold.attention.reference import attend_part
from kvfold.memory.accounting import account
from kvfold.memory.forward import WHOLE, Boundaries, Text
from kvfold.memory.kv import KV
from kvfold.memory.layer import NewTokens
from kvfold.memory.memory import Memory
from kvfold.memory.recorders import FoldEvent, Observation
from kvfold.memory.step import AttentionStep
from kvfold.memory.tail import Tail
from kvfold.plan import Plan

LAYERS = (0, 2)
HEADS, QUERY_HEADS, SIZE = 2, 4, 8
SCALE = SIZE**-0.5
PINNED = 4


def slots(count, *, rows=1, heads=HEADS, first=0, dtype=torch.float32):
    """A rectangle of slots at the positions from `first` on."""
    positions = torch.arange(first, first + count, dtype=torch.int32).expand(rows, heads, -1)
    keys, values = (torch.randn(rows, heads, count, SIZE).to(dtype) for _ in range(2))
    return KV(keys, values, positions)


def tail_of(valid):
    """A tail whose columns are real where these are; positions count each row's real tokens."""
    valid = torch.as_tensor(valid)
    rows, columns = valid.shape
    empty = torch.empty(rows, HEADS, 0, SIZE)
    positions = (valid.long().cumsum(dim=1) - 1).masked_fill(~valid, 0)
    keys, values = (torch.randn(rows, HEADS, columns, SIZE) for _ in range(2))
    marked = None if valid.all() else valid
    return Tail.empty(empty, empty).append(keys, values, positions=positions, valid=marked)


def new_tokens(count, *, rows=1, first: Any = 0, valid=None, dtype=torch.float32, **more):
    """New tokens of one layer. `first` is the position of the first one, of all rows or of each."""
    start = torch.as_tensor(first).reshape(-1, 1)
    return NewTokens(
        queries=torch.randn(rows, QUERY_HEADS, count, SIZE).to(dtype),
        keys=torch.randn(rows, HEADS, count, SIZE).to(dtype),
        values=torch.randn(rows, HEADS, count, SIZE).to(dtype),
        positions=start + torch.arange(count),
        valid=valid,
        **more,
    )


def step_of(queries, **more):
    """A decode step of these queries."""
    return AttentionStep(queries=queries, scale=SCALE, **more)


def observed(queries, tail, **more):
    """What a record is shown: queries over a tail without a folded part, with the log-sum-exp of that tail."""
    count = queries.shape[2]
    keys, values = tail.keys[:, :, : tail.length], tail.values[:, :, : tail.length]
    at = torch.arange(tail.length - count, tail.length)
    sees = (at[:, None] >= torch.arange(tail.length)) & tail.valid[:, None, None]
    log_sum_exp = attend_part(queries, keys, values, scale=SCALE, mask=sees)[1]
    given = {
        "queries": queries,
        "log_sum_exp": log_sum_exp,
        "scale": SCALE,
        "positions": at[None],
        "valid": None,
        "tail": tail,
        "before": tail.length - count,
        "folded": None,
        "hidden_states": None,
    }
    return Observation(**(given | more))


def fold_event(tail, columns, kept, **more):
    """The fold of the oldest columns of a tail, of which some join the folded part."""
    given = {
        "columns": columns,
        "kept": kept,
        "history": None,
        "counts": None,
        "made": 0,
        "tail": tail.after(columns),
        "next_positions": tuple(tail.valid.sum(dim=1).tolist()),
        "for_select": True,
    }
    return FoldEvent(**(given | more))


def rules_of(plan="full", *, pinned=PINNED, layers=LAYERS):
    """The rules that a plan gives to a memory."""
    return (Plan.parse(plan) if isinstance(plan, str) else plan).rules(pinned=pinned, layers=len(layers))


class Fed:
    """A memory and everything that was fed to it. It changes with every forward."""

    def __init__(self, plan="full", *, rows=1, layers=LAYERS, **boundaries):
        given = {"prompt": 0} | boundaries
        self.memory = Memory(rules_of(plan, layers=layers), layers=layers, boundaries=Boundaries(**given))
        self.mask = torch.zeros(rows, 0, dtype=torch.bool)
        self.tokens = {index: [] for index in layers}

    @property
    def rows(self):
        return self.mask.shape[0]

    def forward(self, count, *, seed, dtype=torch.float32, pads=False, layers=None, text=None, reading=WHOLE):
        """Outputs of one forward by layer, [layers, B, G, Q, D]; with pads, row r lacks its last r columns.

        A forward of fewer than all layers is never committed.
        """
        torch.manual_seed(seed)
        lacking = torch.arange(self.rows)[:, None]
        valid = torch.arange(count)[None] < count - lacking if pads else None
        first = self.mask.sum(dim=1)
        running = self.memory.begin(count, text=text, reading=reading)
        outputs = []
        every = tuple(self.memory.layers)
        for index in layers or every:
            new = new_tokens(count, rows=self.rows, first=first, valid=valid, dtype=dtype)
            outputs.append(running.attend(index, new, scale=SCALE, valid=self.mask))
            self.tokens[index] = [*self.tokens[index], new]
        if layers in (None, every):
            self.memory.commit()
            here = torch.ones(self.rows, count, dtype=torch.bool) if valid is None else valid
            self.mask = torch.cat([self.mask, here], dim=1)
        return torch.stack(outputs)

    def with_text(self, count, *, seed, classes):
        """A forward whose tokens have these delimiter classes."""
        marks = torch.tensor([classes] * self.rows, dtype=torch.uint8)
        return self.forward(count, seed=seed, text=Text(classes=marks))

    def lived(self, **more):
        """Feed and fold twice, then feed again: sinks, folded part, tail and records are all there."""
        for seed, count in enumerate((15, 9)):
            self.forward(count, seed=seed, **more)
            self.memory.fold()
        self.forward(6, seed=9, **more)
        return self

    def exact(self, index, *, newest):
        """What the newest tokens of one layer answer over everything that was fed, written out."""
        every = self.tokens[index]
        keys, values, queries = (
            torch.cat([getattr(new, side) for new in every], dim=2) for side in ("keys", "values", "queries")
        )
        at = torch.arange(keys.shape[2])
        sees = (at[:, None] >= at) & self.mask[:, None, None]
        output, _ = attend_part(queries, keys, values, scale=SCALE, mask=sees)
        return output[:, :, -newest:]

    def kept(self, index):
        """Positions that one layer still holds, by row and head, sorted."""
        state = self.memory.layers[index].state
        found = [[[] for _ in range(HEADS)] for _ in range(self.rows)]
        for row in range(self.rows):
            for head in range(HEADS):
                for part in (state.sinks, state.folded):
                    if part is not None:
                        alone = part.take_rows([row])
                        count = alone.counts[0][head]
                        found[row][head] += alone.read(slice(head, head + 1)).positions[0, 0, :count].tolist()
                if state.tail is not None:
                    columns = state.tail.positions[row, : state.tail.length]
                    found[row][head] += columns[columns >= 0].tolist()
                found[row][head].sort()
        return found

    def ledger(self):
        """What the memory holds."""
        return account(self.memory, plan="", device="cpu", other_bytes=0)
