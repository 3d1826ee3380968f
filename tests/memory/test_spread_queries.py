"""Queries spread over a text: as many as there is room for, evenly, however the text came."""

import pytest
import torch

from kvfold.memory.spread_queries import SpreadQueries
from memories import HEADS, QUERY_HEADS, SIZE, observed, tail_of

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
    assert held == list(range(0, length, window.every))
    assert len(held) <= COUNT
    assert len(held) > COUNT // 2 or window.every == 1
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
