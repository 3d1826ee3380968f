"""Hidden states of raw tokens: appended, dropped with their columns, and refused where a model shows none."""

import pytest
import torch

from kvfold.errors import CacheError
from kvfold.memory.hidden_states import HiddenStates
from memories import QUERY_HEADS, SIZE, fold_event, observed, tail_of

WIDTH = 3


def after(record, count, first=0, rows=2):
    """The record after `count` tokens whose states are their column."""
    tail = tail_of(torch.ones(rows, first + count, dtype=torch.bool))
    states = torch.arange(first, first + count).view(1, -1, 1).expand(rows, -1, WIDTH).float()
    queries = torch.randn(rows, QUERY_HEADS, count, SIZE)
    return record.observe(observed(queries, tail, hidden_states=states))


def columns(record):
    assert bool((record.states == record.states[..., :1]).all())
    return record.states[0, :, 0].tolist()


def opened(rows=2):
    return HiddenStates().open(torch.empty(rows, 2, 0, SIZE))


def test_states_are_kept_for_every_raw_column():
    record = after(after(opened(), 3), 2, first=3)
    assert columns(record) == [0, 1, 2, 3, 4]
    assert record.states.shape == (2, 5, WIDTH)


def test_a_fold_drops_the_columns_that_leave_and_keeps_no_longer_storage():
    tail = tail_of([[True] * 5, [True] * 5])
    kept = torch.ones(2, 2, 3, dtype=torch.bool)
    left = after(opened(), 5).fold(fold_event(tail, 3, kept))
    assert columns(left) == [3, 4]
    assert left.states.untyped_storage().nbytes() == left.states.nbytes


def test_a_crop_drops_the_newest_columns():
    assert columns(after(opened(), 5).crop([3, 3], columns=2)) == [0, 1, 2]


def test_pads_stay_where_they_are_so_that_columns_agree_with_the_tail():
    record = after(opened(), 3)
    assert record.invalidate(torch.tensor([[1, -1, -1], [-1, -1, -1]])) is record


def test_rows_are_picked():
    record = after(opened(), 2)
    changed = type(record)(states=record.states + torch.tensor([0.0, 10.0]).view(2, 1, 1))
    assert columns(changed.take_rows([1])) == [10, 11]


def test_a_model_that_shows_no_states_is_refused_with_a_way_out():
    tail = tail_of([[True]])
    with pytest.raises(CacheError, match="use a method that does without them"):
        opened(rows=1).observe(observed(torch.randn(1, QUERY_HEADS, 1, SIZE), tail))


def test_what_was_saved_comes_back():
    record = after(opened(), 4)
    again = HiddenStates().restore(record.plain(), dict(record.tensors()))
    assert torch.equal(again.states, record.states)


def test_no_gradient_is_kept_alive():
    tail = tail_of([[True]])
    states = torch.randn(1, 1, WIDTH, requires_grad=True)
    record = opened(rows=1).observe(observed(torch.randn(1, QUERY_HEADS, 1, SIZE), tail, hidden_states=states))
    assert not record.states.requires_grad
