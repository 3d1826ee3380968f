"""The window of newest queries: pads never enter, rows differ in length, and what is taken back leaves."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvfold.memory.window import remember


def queries_at(positions):
    """Queries that carry their position in every number, for one row list a row."""
    marked = torch.tensor(positions)
    return marked[:, None, :, None].expand(-1, 4, -1, 2).float(), marked[:, None].expand(-1, 4, -1).float(), marked


def fed(window, positions, width):
    queries, weights, marked = queries_at(positions)
    valid = marked >= 0
    return remember(window, queries, weights, positions=marked, valid=None if valid.all() else valid, width=width)


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
    assert held(window.before(torch.tensor([2, 7]))) == [[0, 1], [5, 6]]
    assert held(window.since(torch.tensor([2, 7]))) == [[2, 3], [7]]
    assert held(window.without(torch.tensor([[1, -1], [5, 7]]))) == [[0, 2, 3], [6]]
    assert held(window.rows([1, 1])) == [[5, 6, 7], [5, 6, 7]]
    assert held(window.before(torch.tensor([0, 0]))) == [[], []]
