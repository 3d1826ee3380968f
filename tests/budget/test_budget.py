"""Budgets in three kinds become slots, and what holds nothing says what to give."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.budget.budget import Budget
from kvfold.errors import BudgetError


def slots(budget, *, seen=1000, pinned=4, slot_bytes=132, token_bytes=128, shares=4):
    return budget.slots(seen=seen, pinned=pinned, slot_bytes=slot_bytes, token_bytes=token_bytes, shares=shares)


def test_a_fraction_is_of_bytes_and_pays_for_positions():
    assert slots(Budget(fraction=0.5)) == 64_000 // 132


def test_a_fraction_always_allows_the_sinks():
    assert slots(Budget(fraction=0.01), seen=20) == 4
    assert slots(Budget(fraction=0.01), seen=3) == 3


def test_a_fraction_has_a_floor_and_other_budgets_hold_as_they_are():
    assert Budget(fraction=0.1).floor(seen=35, least=256, once=False) == 35
    assert Budget(fraction=0.1).floor(seen=3000, least=256, once=False) == 256
    assert Budget(fraction=0.1).floor(seen=3000, least=0, once=True) == 0
    assert Budget(tokens=20).floor(seen=35, least=256, once=False) == 0


@given(fraction=st.floats(0.01, 1.0), seen=st.integers(257, 3000), turn=st.integers(1, 400))
def test_above_the_floor_a_turn_that_is_folded_once_still_gets_a_share(fraction, seen, turn):
    budget = Budget(fraction=fraction)
    held, more = (budget.floor(seen=tokens, least=256, once=True) for tokens in (seen, seen + turn))
    assert more - held >= int(fraction * turn / 2)
    assert held <= seen


def test_tokens_are_slots_of_a_head():
    assert slots(Budget(tokens=77)) == 77


def test_bytes_are_split_over_rows_and_layers():
    assert slots(Budget(size_bytes=132 * 4 * 50)) == 50


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (Budget(tokens=4), "give tokens=5 or more, or pin less"),
        (Budget(size_bytes=132 * 4 * 4), f"give max_bytes={132 * 4 * 5} or more"),
    ],
)
def test_a_budget_that_holds_only_sinks_says_what_is_needed(budget, says):
    with pytest.raises(BudgetError, match=says):
        slots(budget)


def test_what_the_error_asks_for_is_enough():
    assert slots(Budget(size_bytes=132 * 4 * 5)) == 5
    assert slots(Budget(tokens=5)) == 5


@pytest.mark.parametrize("given_", [{}, {"fraction": 0.5, "tokens": 3}])
def test_exactly_one_kind_is_given(given_):
    with pytest.raises(BudgetError, match="give exactly one"):
        Budget(**given_)


@settings(deadline=None)
@given(st.floats(0.001, 1.0), st.integers(5, 100_000), st.integers(1, 500), st.integers(0, 40))
def test_a_fraction_never_spends_more_than_it_says(fraction, seen, token_bytes, extra):
    held = Budget(fraction=fraction).slots(
        seen=seen, pinned=0, slot_bytes=token_bytes + extra, token_bytes=token_bytes, shares=1
    )
    assert held * (token_bytes + extra) <= fraction * seen * token_bytes + 1e-3
    assert (held + 1) * (token_bytes + extra) > fraction * seen * token_bytes - 1e-3
