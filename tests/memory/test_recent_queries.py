"""The window of newest queries: pads never enter, rows differ in length, and what is taken back leaves."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.recorders import FoldEvent, Observation
from kvfold.memory.tail import Tail

NO_KEYS = torch.empty(2, 2, 0, 2)
NO_TAIL = Tail.empty(NO_KEYS, NO_KEYS)


def fed(window, positions, width):
    """A window after queries that carry their position in every number, one row list a row."""
    marked = torch.tensor(positions)
    valid = marked >= 0
    seen = Observation(
        queries=marked[:, None, :, None].expand(-1, 4, -1, 2).float(),
        log_sum_exp=marked[:, None].expand(-1, 4, -1).float(),
        scale=1.0,
        positions=marked,
        valid=None if valid.all() else valid,
        tail=NO_TAIL,
        before=0,
        folded=None,
        hidden_states=None,
    )
    return (RecentQueries(width).open(NO_KEYS) if window is None else window).observe(seen)


def held(window):
    """Positions of each row, checked against the queries that stand beside them."""
    for row, marked in enumerate(window.positions.tolist()):
        for column, position in enumerate(marked):
            if position >= 0:
                assert (window.queries[row, :, column] == position).all()
                assert (window.log_sum_exp[row, :, column] == position).all()
    return [[position for position in row if position >= 0] for row in window.positions.tolist()]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_it_holds_the_newest_real_queries_of_each_row_however_they_came(columns, width, data):
    counts, rows = [0, 0], [[], []]
    for column in columns:
        for row, real in enumerate(column):
            rows[row].append(counts[row] if real else -1)
            counts[row] += real
    window, at = None, 0
    while at < len(columns):
        step = data.draw(st.integers(1, len(columns) - at))
        window = fed(window, [row[at : at + step] for row in rows], width)
        at += step
    wanted = [[position for position in row if position >= 0][-width:] for row in rows]
    assert held(window) == wanted


def test_queries_leave_by_position():
    window = fed(None, [[0, 1, 2, 3], [5, 6, 7, -1]], 4)
    assert held(window.crop([2, 7], 2)) == [[0, 1], [5, 6]]
    assert held(window.since(torch.tensor([2, 7]))) == [[2, 3], [7]]
    assert held(window.invalidate(torch.tensor([[1, -1], [5, 7]]))) == [[0, 2, 3], [6]]
    assert held(window.take_rows([1, 1])) == [[5, 6, 7], [5, 6, 7]]
    assert held(window.crop([0, 0], 4)) == [[], []]


def folded(window, *, raw, seen, for_select=True):
    """The window after a fold that left so many raw columns."""
    keys = torch.zeros(2, 2, raw, 2)
    positions = torch.arange(raw).expand(2, -1)
    tail = NO_TAIL if raw == 0 else NO_TAIL.append(keys, keys, positions=positions, valid=None)
    none = torch.zeros(2, 2, 0, dtype=torch.bool)
    return window.fold(
        FoldEvent(columns=0, kept=none, history=None, counts=None, made=0, tail=tail, seen=seen, for_select=for_select)
    )


def test_a_fold_leaves_the_queries_of_tokens_that_are_still_raw():
    window = fed(None, [[0, 1, 2, 3], [5, 6, 7, 8]], 4)
    assert held(folded(window, raw=2, seen=(4, 9))) == [[2, 3], [7, 8]]
    assert folded(window, raw=0, seen=(4, 9)) is None


def test_a_fold_leaves_everything_where_only_the_place_reads_queries():
    window = fed(None, [[0, 1, 2, 3], [5, 6, 7, 8]], 4)
    assert folded(window, raw=0, seen=(4, 9), for_select=False) is window


def test_queries_that_just_attended_follow_the_recorded_ones_without_a_log_sum_exp():
    window = fed(None, [[0, 1, 2], [5, 6, -1]], 3)
    new = torch.tensor([[3, 4], [7, 8]])
    later = window.followed_by(new[:, None, :, None].expand(-1, 4, -1, 2).float(), positions=new, valid=None)
    assert later.positions.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert later.queries[:, 0, :, 0].tolist() == [[2, 3, 4], [6, 7, 8]]
    assert later.log_sum_exp[:, 0].tolist() == [[2, 0, 0], [6, 0, 0]]


def test_two_members_share_one_window_and_each_reads_as_much_as_it_named():
    both = RecentQueries(2).joined(RecentQueries(4))
    assert both == RecentQueries(4)
    window = fed(both.open(NO_KEYS), [[0, 1, 2, 3], [5, 6, 7, 8]], 4)
    assert held(window.last(2)) == [[2, 3], [7, 8]]
    assert window.last(2).heads(slice(1, 3)).queries.shape == (2, 2, 2, 2)


def test_a_window_is_built_again_from_its_tensors():
    window = fed(None, [[0, 1, -1], [5, 6, 7]], 4)
    again = RecentQueries(4).restore(window.plain(), dict(window.tensors()))
    assert held(again) == [[0, 1], [5, 6, 7]]
    assert held(fed(again, [[2, 3, 4], [8, 9, 10]], 4)) == [[1, 2, 3, 4], [7, 8, 9, 10]]
