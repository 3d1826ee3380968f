"""Orders of flat slots, against lists of lists: what is moved arrives where it should, and nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.memory import ragged

COUNTS = st.integers(1, 3).flatmap(
    lambda heads: st.lists(st.lists(st.integers(0, 4), min_size=heads, max_size=heads), min_size=1, max_size=3)
)


def named(counts, word):
    """Slots as words, [row][head][slot], and the same in flat order."""
    nested = [
        [[f"{word}{row}.{head}.{slot}" for slot in range(count)] for head, count in enumerate(of_heads)]
        for row, of_heads in enumerate(counts)
    ]
    return nested, [slot for row in nested for head in row for slot in head]


def as_tuples(counts):
    return tuple(tuple(row) for row in counts)


def test_counts_are_listed_row_by_row():
    counts = ((2, 0), (1, 3))
    assert ragged.flat(counts) == (2, 0, 1, 3)
    assert ragged.total(counts) == 6
    assert ragged.row_starts(counts) == [0, 2, 6]


@pytest.mark.parametrize(
    ("counts", "same"), [(((2, 2), (2, 2)), True), (((2, 2), (2, 1)), False), (((0,),), True), (((1, 3),), False)]
)
def test_counts_are_uniform_when_every_head_of_every_row_holds_as_many(counts, same):
    assert ragged.uniform(counts) is same


def test_a_mask_is_counted_by_row_and_head():
    kept = torch.tensor([[[True, False, True], [False, False, False]], [[True, True, True], [False, True, False]]])
    assert ragged.counted(kept) == ((2, 0), (3, 1))
    assert ragged.counted(kept[:, :, :0]) == ((0, 0), (0, 0))


@settings(deadline=None)
@given(COUNTS, st.data())
def test_counts_after_a_mask_are_those_of_the_slots_that_stay(counts, data):
    counts = as_tuples(counts)
    kept = data.draw(st.lists(st.booleans(), min_size=ragged.total(counts), max_size=ragged.total(counts)))
    nested, flat = named(counts, "s")
    stays = {slot for slot, stay in zip(flat, kept, strict=True) if stay}
    wanted = tuple(tuple(sum(slot in stays for slot in head) for head in row) for row in nested)
    assert ragged.counts_after(counts, torch.tensor(kept, dtype=torch.bool)) == wanted


@settings(deadline=None)
@given(COUNTS, st.data())
def test_rows_are_picked_in_any_order_and_more_than_once(counts, data):
    counts = as_tuples(counts)
    rows = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=5))
    nested, flat = named(counts, "s")
    order = ragged.order_of_rows(counts, rows)
    assert [flat[at] for at in order.tolist()] == [slot for row in rows for head in nested[row] for slot in head]


@settings(deadline=None)
@given(COUNTS, st.data())
def test_interleaved_slots_are_each_heads_first_ones_and_then_its_second_ones(counts, data):
    first = as_tuples(counts)
    more = [data.draw(st.lists(st.integers(0, 3), min_size=len(row), max_size=len(row))) for row in first]
    second = as_tuples(more)
    mine, flat_mine = named(first, "a")
    theirs, flat_theirs = named(second, "b")
    both = flat_mine + flat_theirs
    order = ragged.interleave(first, second)
    wanted = [
        slot
        for row_a, row_b in zip(mine, theirs, strict=True)
        for head_a, head_b in zip(row_a, row_b, strict=True)
        for slot in head_a + head_b
    ]
    assert [both[at] for at in order.tolist()] == wanted
    assert ragged.flat(ragged.added(first, second)) == tuple(
        a + b for a, b in zip(ragged.flat(first), ragged.flat(second), strict=True)
    )


def test_a_rectangle_of_rows_and_heads_is_found_in_flat_order():
    counts = ((2, 3), (2, 1), (2, 4))
    nested, flat = named(counts, "s")
    where = ragged.rectangle(counts, [2, 0], slice(0, 1))
    assert where.shape == (2, 1, 2)
    assert [[flat[at] for at in row[0]] for row in where.tolist()] == [nested[2][0], nested[0][0]]
    one = ragged.rectangle(counts, [1], slice(1, 2))
    assert [flat[at] for at in one.flatten().tolist()] == nested[1][1]
