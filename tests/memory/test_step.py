"""A decode step: its pieces, the queries that choose pages, and whether a sentence has just ended."""

import torch

from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.step import ForwardScope
from kvfold.memory.transcript import APART, Transcript
from memories import HEADS, QUERY_HEADS, SIZE, step_of

GROUP = QUERY_HEADS // HEADS


def queries_of(count, rows=2):
    return torch.randn(rows, QUERY_HEADS, count, SIZE)


def window_of(queries, positions):
    """Recent queries at these positions, as many as there are."""
    window = RecentQueries(queries.shape[2]).open(torch.empty(len(queries), HEADS, 0, SIZE))
    return window.followed_by(queries, positions=torch.tensor(positions), valid=None)


def test_a_piece_has_its_share_of_everything():
    valid = torch.tensor([[True, True, False], [True, True, True]])
    step = step_of(queries_of(3), positions=torch.arange(3)[None], valid=valid)
    piece = step.piece(1, 3)
    assert torch.equal(piece.queries, step.queries[:, :, 1:])
    assert piece.positions.tolist() == [[1, 2]]
    assert piece.valid.tolist() == [[True, False], [True, True]]
    assert piece.scale == step.scale


def test_queries_before_a_piece_count_as_recent_ones():
    recent = window_of(queries_of(2), [[0, 1], [0, 1]])
    step = step_of(queries_of(3), positions=torch.tensor([[2, 3, 4]]), recent=lambda: recent)
    assert step.piece(2, 3).recent().positions.tolist() == [[2, 3], [2, 3]]
    assert torch.equal(step.piece(2, 3).recent().queries, step.queries[:, :, :2])
    assert step.piece(0, 2).recent() is recent


def test_the_mean_query_is_taken_over_the_group_and_the_tokens():
    queries = queries_of(3)
    mean = step_of(queries).mean_query(HEADS)
    wanted = queries.unflatten(1, (HEADS, GROUP)).mean(dim=(2, 3)).flatten(0, 1)
    assert mean.shape == (2 * HEADS, SIZE)
    assert torch.allclose(mean, wanted, atol=1e-6)


def test_the_first_new_query_chooses_alone_where_none_are_recorded():
    queries = queries_of(4)
    newest, real = step_of(queries).newest(2, HEADS)
    assert real is None
    assert newest.shape == (2 * HEADS, GROUP, SIZE)
    assert torch.equal(newest[1], queries[0, GROUP : 2 * GROUP, 0])


def test_recorded_queries_choose_with_it_and_missing_ones_are_marked():
    old = queries_of(3)
    recent = window_of(old, [[-1, 4, 5], [3, 4, 5]])
    queries = queries_of(1)
    newest, real = step_of(queries, recent=lambda: recent).newest(3, HEADS)
    assert newest.shape == (2 * HEADS, GROUP * 4, SIZE)
    assert real.view(2, HEADS, GROUP, 4)[0].tolist() == [[[False, True, True, True]] * GROUP] * HEADS
    assert bool(real.view(2, HEADS, GROUP, 4)[1].all())
    last = newest.view(2, HEADS, GROUP, 4, SIZE)[:, :, :, -1]
    assert torch.equal(last, queries.unflatten(1, (HEADS, GROUP))[:, :, :, 0])


def test_a_pad_does_not_choose():
    valid = torch.tensor([[False], [True]])
    _, real = step_of(queries_of(1), valid=valid).newest(2, HEADS)
    assert real.view(2, -1).any(dim=1).tolist() == [False, True]


def scope_of(classes):
    at = torch.arange(len(classes))[None]
    marks = torch.tensor([classes], dtype=torch.uint8)
    return ForwardScope(transcript=Transcript().with_classes(at, marks, None))


def test_a_sentence_that_ended_before_the_first_new_token_is_seen():
    step = step_of(queries_of(1, rows=1), positions=torch.tensor([[2]]), forward=scope_of([0, 5, APART]))
    assert step.sentence_ended.tolist() == [True]


def test_without_a_text_nobody_knows_where_sentences_end():
    step = step_of(queries_of(1, rows=1), positions=torch.tensor([[2]]))
    assert step.sentence_ended is None
    assert step_of(queries_of(1, rows=1), forward=ForwardScope()).sentence_ended is None
