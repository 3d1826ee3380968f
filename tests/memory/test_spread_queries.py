"""Queries spread over a text: as many as there is room for, evenly, however the text came."""

import pytest
import torch

from kvfold.memory.spread_queries import SpreadQueries
from memories import HEADS, QUERY_HEADS, SIZE, fold_event, observed, tail_of

COUNT = 8


def fed(window, start, stop, *, step):
    """The record after columns `start` to `stop`, so many at a time; queries carry their position."""
    for first in range(start, stop, step):
        positions = torch.arange(first, min(first + step, stop))[None]
        queries = positions[:, None, :, None].expand(-1, QUERY_HEADS, -1, SIZE).float()
        tail = tail_of(torch.ones(1, first + positions.shape[1], dtype=torch.bool))
        window = window.observe(observed(queries, tail))
    return window


def opened():
    return SpreadQueries(COUNT).open(torch.empty(1, HEADS, 0, SIZE))


@pytest.mark.parametrize("step", [1, 3, 7, 100])
@pytest.mark.parametrize("length", [5, 8, 9, 31, 100])
def test_they_are_evenly_spread_and_never_more_than_their_number(length, step):
    window = fed(opened(), 0, length, step=step)
    held = window.positions[0].tolist()
    (every,) = window.every
    assert held == list(range(0, length, every))
    assert len(held) <= COUNT
    assert len(held) > COUNT // 2 or every == 1
    assert torch.equal(window.queries[0, 0, :, 0].long(), window.positions[0].long())


def test_queries_that_are_taken_back_are_gone_and_the_text_goes_on():
    window = fed(opened(), 0, 20, step=4).crop([10], 10)
    assert max(window.positions[0].tolist()) < 10
    again = fed(window, 10, 20, step=4)
    assert [at for at in again.positions[0].tolist() if at >= 0] == list(range(0, 20, 4))


def test_what_was_saved_goes_on_as_before():
    window = fed(opened(), 0, 20, step=4)
    restored = SpreadQueries(COUNT).restore(window.plain(), dict(window.tensors()))
    assert torch.equal(fed(restored, 20, 50, step=6).positions, fed(window, 20, 50, step=6).positions)


def test_an_earlier_saved_form_is_read():
    window = fed(opened(), 0, 20, step=4)
    restored = SpreadQueries(COUNT).restore({"every": 4}, dict(window.tensors()))
    assert restored.every == window.every == (4,)


def batch_fed(lengths, *, step):
    """The record of rows of these lengths, which end in pads."""
    window = SpreadQueries(COUNT).open(torch.empty(len(lengths), HEADS, 0, SIZE))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    for first in range(0, max(lengths), step):
        some = slice(first, first + step)
        positions = torch.arange(max(lengths))[some].expand(len(lengths), -1)
        queries = positions[:, None, :, None].expand(-1, QUERY_HEADS, -1, SIZE).float()
        valid = None if bool(real[:, some].all()) else real[:, some]
        tail = tail_of(real[:, : first + step])
        window = window.observe(observed(queries, tail, positions=positions, valid=valid))
    return window


@pytest.mark.parametrize("step", [1, 7, 100])
def test_a_short_row_holds_as_many_beside_a_long_one_as_alone(step):
    lengths = (100, 9, 5)
    window = batch_fed(lengths, step=step)
    for row, length in enumerate(lengths):
        alone = fed(opened(), 0, length, step=step)
        assert [at for at in window.positions[row].tolist() if at >= 0] == alone.positions[0].tolist()
        assert window.every[row] == alone.every[0]


def test_after_a_fold_the_next_tokens_are_recorded_densely_again():
    window = fed(opened(), 0, 40, step=10)
    assert window.every == (8,)
    tail = tail_of(torch.ones(1, 40, dtype=torch.bool))
    left = window.fold(fold_event(tail, 30, torch.ones(1, HEADS, 30, dtype=torch.bool)))
    assert left.positions[0].tolist() == [32]
    again = fed(left, 40, 47, step=7)
    assert [at for at in again.positions[0].tolist() if at >= 0] == [32, *range(40, 47)]


def test_rows_are_taken_with_their_distances():
    window = batch_fed((100, 5), step=100)
    assert window.take_rows([1, 1, 0]).every == (window.every[1], window.every[1], window.every[0])
