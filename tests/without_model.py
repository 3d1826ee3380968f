"""A memory of two layers that folds by any plan without a model: what folds ask of one is answered at random."""

from typing import Any

import torch

from kvfold.memory.forward import Boundaries, Text
from kvfold.memory.layer import NewTokens
from kvfold.memory.memory import Memory
from ranks import random_ranks

PINNED = 4
RANKS = random_ranks(2, 4, [0, 1])


def memory_of(plan, *, prompt=0, stride=None):
    rules = plan.rules(pinned=PINNED, layers=2, layout=plan.encode.bound(RANKS))
    memory = Memory(rules, layers=[0, 1], boundaries=Boundaries(prompt=prompt, stride=stride))
    access: Any = NoModel()
    memory.access = access
    return memory


class NoAdapter:
    """Scores of slots at random, and no Nexus rows: a row may share its position with a slot that is kept."""

    size_bytes = 0

    def embed(self, rows):
        """Nothing is asked."""
        raise AssertionError("there are no rows")

    def gate(self, layer):
        """Nothing is asked."""
        raise AssertionError("there are no rows")

    def active(self):
        """Nothing is asked."""
        raise AssertionError("there are no rows")

    def moved(self, queries, positions, to):
        """As they are: keys here are not rotated."""
        return queries

    def score(self, keys, values, positions, real):
        """Any scores."""
        rows, tokens, layers, heads, _ = keys.shape
        return torch.rand(rows, layers, heads, tokens), None


class NoModel:
    """What a fold asks of a model, answered at random."""

    adapter = NoAdapter()

    def replay(self, states, text):
        """Attention to every column of the tail while its text is replayed."""
        return {index: torch.rand(len(text.ids), 2, state.tail.length) for index, state in states.items()}

    def run(self, states, rows):
        """Keys and values of rows."""
        batch, count = rows.rows.shape
        return {index: (torch.randn(batch, 2, count, 4), torch.randn(batch, 2, count, 4)) for index in states}


def feed(memory, mask, new):
    """Feed `new` random columns, the last of `mask`."""
    rows = mask.shape[0]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
    forward = memory.begin(new, text=Text(ids=torch.randint(3, 90, (rows, new))))
    for index in (0, 1):
        queries, keys, values = (torch.randn(rows, heads, new, 4) for heads in (4, 2, 2))
        valid = None if mask[:, -new:].all() else mask[:, -new:]
        tokens = NewTokens(
            queries=queries,
            keys=keys,
            values=values,
            positions=positions,
            valid=valid,
            hidden_states=torch.randn(rows, new, 6),
        )
        output = forward.attend(index, tokens, scale=0.5, valid=mask[:, :-new])
        assert output.isfinite().all()
    memory.commit()
