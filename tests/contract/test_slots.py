"""Contract 7, as properties: sinks survive everything; kept slots are sorted, unique, in range and within budget.

A memory is driven without a model: random keys and queries, random pads, feeds, folds, forks, rows and budgets.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driving import places_of, storages
from kvfold.errors import BudgetError
from kvfold.memory.accounting import account
from kvfold.plan import Plan
from plans import TOKENS, Uneven, lossy, pairs
from without_model import PINNED, RANKS, feed, memory_of

LOSSY = {**lossy(), "uneven": Plan(select=Uneven(tokens=TOKENS)), **pairs()}


def check(memory, mask):
    """Every promise about the slots of a memory."""
    for layer in memory.layers.values():
        state = layer.state
        if not state.seen:
            continue
        assert list(state.seen) == mask.sum(dim=1).tolist()
        of_sinks, of_folded = places_of(state.sinks), places_of(state.folded)
        for row, seen in enumerate(state.seen):
            raw = [position for position in state.tail.positions[row, : state.tail.length].tolist() if position >= 0]
            for head in range(2):
                sinks = [] if of_sinks is None else of_sinks[row][head]
                folded = [] if of_folded is None else of_folded[row][head]
                everything = [*sinks, *folded, *raw]
                assert everything == sorted(set(everything))
                assert set(everything) <= set(range(seen))
                assert set(range(min(PINNED, seen))) <= set(everything)
                assert raw == list(range(seen - len(raw), seen))
    ledger = account(memory, plan="", device="cpu", other_bytes=0)
    assert sum(storages(memory).values()) == ledger.stored_bytes


@st.composite
def lives(draw):
    """Columns with pads anywhere, and what happens to the memory between them."""
    rows = draw(st.integers(1, 3))
    steps = draw(
        st.lists(
            st.tuples(st.integers(1, 12), st.sampled_from(["", "fold", "half", "fork", "less", "rows"])), max_size=6
        )
    )
    columns = sum(new for new, _ in steps)
    pads = [draw(st.sampled_from([0, 0, 1, 3, 9, 40])) for _ in range(rows)]
    starts = [draw(st.integers(0, max(columns, 1))) for _ in range(rows)]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for row, (count, start) in enumerate(zip(pads, starts, strict=True)):
        mask[row, start : start + count] = False
    return steps, mask, draw(st.sampled_from([None, 3, 7]))


@pytest.mark.parametrize("name", LOSSY)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(life=lives())
def test_sinks_survive_and_slots_are_sorted_unique_and_in_range(name, life):
    steps, mask, stride = life
    memory, at = memory_of(LOSSY[name], prompt=0 if stride is None else 5, stride=stride), 0
    for new, then in steps:
        at += new
        feed(memory, mask[:, :at], new)
        check(memory, mask[:, :at])
        memory, mask = happens(memory, mask, then, LOSSY[name])
        check(memory, mask[:, :at])


def happens(memory, mask, then, plan):
    """One thing that may happen to a memory between forwards."""
    if then == "fold":
        memory.fold()
        tails = [layer.state.tail for layer in memory.layers.values()]
        assert not memory.rules.folds or all(tail.length == 0 for tail in tails)
        if plan.has_budget:
            check_budget(memory)
    if then == "half":
        memory.fold(until=memory.fed // 2)
    if then == "fork":
        memory = memory.fork()
    if then == "less" and plan.has_budget:
        lower = plan.with_budget(tokens=6)
        try:
            memory.set_rules(lower.rules(pinned=PINNED, layers=2, layout=lower.encode.bound(RANKS)))
        except BudgetError:
            assert plan.select.chooses_jointly, "whole slots can be evicted again and again"
    if then == "rows":
        rows = [mask.shape[0] - 1, *range(mask.shape[0])]
        memory.take_rows(rows)
        mask = mask[rows]
    return memory, mask


def check_budget(memory):
    """No head has more than the budget, or, where all layers are folded together, heads have no more on average."""
    held = []
    for layer in memory.layers.values():
        for sinks, heads in zip(layer.state.sinks.counts, layer.state.folded.counts, strict=True):
            held.append([pinned + count for pinned, count in zip(sinks, heads, strict=True)])
    if memory.rules.select.chooses_jointly:
        rows = len(held) // len(memory.layers)
        held = [[sum(sum(own) for own in held[row::rows]) / (2 * len(memory.layers))] for row in range(rows)]
    assert all(count <= memory.rules.select.tokens for own in held for count in own)


@pytest.mark.parametrize("name", [name for name, plan in LOSSY.items() if plan.has_budget])
@settings(max_examples=15, deadline=None)
@given(seen=st.integers(1, 40), keep=st.floats(0.01, 1.0))
def test_a_fraction_is_met_or_only_the_sinks_are_held(name, seen, keep):
    memory = memory_of(LOSSY[name].with_budget(keep=keep))
    feed(memory, torch.ones(1, seen, dtype=torch.bool), seen)
    memory.fold()
    ledger = account(memory, plan="", device="cpu", other_bytes=0)
    slot = 2 * 4 * 4 + 8  # a key, a value, a position and at most a sum
    if memory.rules.layout.lossless and memory.rules.placement is None:  # an index comes on top of what is stored
        assert ledger.stored_bytes <= max(keep * ledger.full_bytes, min(PINNED, seen) * 2 * 2 * slot) + 1
    check(memory, torch.ones(1, seen, dtype=torch.bool))


def test_a_budget_below_the_sinks_says_what_to_give():
    with pytest.raises(BudgetError, match="give tokens=5 or more, or pin less"):
        memory_of(Plan(select=Uneven(tokens=4)))
