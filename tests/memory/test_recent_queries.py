"""The window of newest queries: pads never enter, rows differ in length, and what is taken back leaves."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.recorders import Observation
from memories import fold_event, tail_of

QUERY_HEADS = 4


def queries_at(positions):
    """Queries and log-sum-exps that carry their position in every number, one list of positions a row."""
    marked = torch.tensor(positions)
    queries = marked[:, None, :, None].expand(-1, QUERY_HEADS, -1, 2).float()
    return queries, marked[:, None].expand(-1, QUERY_HEADS, -1).float()


def opened(width, rows=2):
    return RecentQueries(width).open(torch.empty(rows, 2, 0, 2))


def fed(window, positions):
    """The window after these queries; -1 is a pad."""
    marked = torch.tensor(positions)
    queries, log_sum_exp = queries_at(positions)
    valid = None if bool((marked >= 0).all()) else marked >= 0
    tail = tail_of(marked >= 0)
    return window.observe(
        Observation(
            queries=queries, log_sum_exp=log_sum_exp, scale=1.0, positions=marked, valid=valid, tail=tail, before=0,
            folded=None, hidden_states=None,
        )
    )  # fmt: skip


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
    window, at = opened(width), 0
    while at < len(columns):
        step = data.draw(st.integers(1, len(columns) - at))
        window = fed(window, [row[at : at + step] for row in rows])
        at += step
    wanted = [[position for position in row if position >= 0][-width:] for row in rows]
    assert held(window) == wanted


def test_a_crop_drops_the_queries_of_tokens_that_are_taken_back():
    window = fed(opened(4), [[0, 1, 2, 3], [5, 6, 7, -1]])
    assert held(window.crop([2, 7], columns=2)) == [[0, 1], [5, 6]]
    assert held(window.crop([0, 0], columns=4)) == [[], []]


def test_queries_leave_by_position():
    window = fed(opened(4), [[0, 1, 2, 3], [5, 6, 7, -1]])
    assert held(window.since(torch.tensor([2, 7]))) == [[2, 3], [7]]
    assert held(window.invalidate(torch.tensor([[1, -1], [5, 7]]))) == [[0, 2, 3], [6]]
    assert held(window.take_rows([1, 1])) == [[5, 6, 7], [5, 6, 7]]


def test_the_newest_few_are_a_view_of_the_window():
    window = fed(opened(4), [[0, 1, 2, 3], [4, 5, 6, 7]])
    few = window.last(2)
    assert held(few) == [[2, 3], [6, 7]]
    assert few.queries.untyped_storage().data_ptr() == window.queries.untyped_storage().data_ptr()
    assert held(window.last(9)) == held(window)


def test_heads_are_sliced_with_their_sums():
    window = fed(opened(3), [[0, 1, 2], [3, 4, 5]]).heads(slice(2, 4))
    assert window.queries.shape[1] == window.log_sum_exp.shape[1] == 2


def test_queries_without_sums_follow_for_readers_of_queries_only():
    window = fed(opened(3), [[0, 1], [0, 1]])
    later = window.followed_by(queries_at([[2, 3], [2, 3]])[0], positions=torch.tensor([[2, 3]]), valid=None)
    assert later.positions.tolist() == [[1, 2, 3]] * 2
    assert (later.log_sum_exp[:, :, 1:] == 0).all()
    assert held(window) == [[0, 1], [0, 1]]


def test_a_fold_keeps_the_queries_of_tokens_that_are_still_raw():
    tail = tail_of([[True] * 5])
    window = fed(opened(5, rows=1), [[0, 1, 2, 3, 4]])
    kept = torch.ones(1, 2, 3, dtype=torch.bool)
    assert held(window.fold(fold_event(tail, 3, kept))) == [[3, 4]]


def test_a_fold_of_everything_leaves_no_window():
    tail = tail_of([[True] * 3])
    window = fed(opened(5, rows=1), [[0, 1, 2]])
    kept = torch.ones(1, 2, 3, dtype=torch.bool)
    assert window.fold(fold_event(tail, 3, kept)) is None


def test_a_fold_changes_nothing_for_a_place_that_reads_the_window_alone():
    tail = tail_of([[True] * 3])
    window = fed(opened(5, rows=1), [[0, 1, 2]])
    event = fold_event(tail, 3, torch.ones(1, 2, 3, dtype=torch.bool), for_select=False)
    assert window.fold(event) is window


def test_of_two_settings_the_wider_one_serves_both():
    assert RecentQueries(4).joined(RecentQueries(9)) == RecentQueries(9)
    assert RecentQueries(4).joined(RecentQueries(2)) == RecentQueries(4)


def test_what_was_saved_comes_back():
    window = fed(opened(3), [[0, 1, -1], [0, 1, 2]])
    again = RecentQueries(3).restore(window.plain(), dict(window.tensors()))
    assert held(again) == held(window)
    assert held(fed(again, [[2], [3]])) == [[0, 1, 2], [1, 2, 3]]
