"""Sums and maxima of the attention matrix, block by block, against the matrix written out; pooled and dilated ones."""

import pytest
import torch

from kvfold.attention import scores as module
from kvfold.attention.reference import attend_part, causal_mask
from kvfold.attention.scores import attention_sums, max_attention_scores, pool_and_dilate

SCALE = 0.4


def written_out(queries, keys, *, causal=False):
    """The attention matrix by key/value head: B, H, group, Q, S."""
    group = queries.shape[1] // keys.shape[1]
    scores = queries @ keys.repeat_interleave(group, dim=1).mT * SCALE
    if causal:
        scores = scores.masked_fill(~causal_mask(queries.shape[2], keys.shape[2], keys.device), -torch.inf)
    return scores.softmax(dim=-1).unflatten(1, (-1, group))


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_are_those_of_the_matrix(monkeypatch, causal, pads, block):
    monkeypatch.setattr(module, "_BLOCK", (block, block + 2))
    queries, keys = torch.randn(2, 4, 8, 6), torch.randn(2, 2, 8 if causal else 11, 6)
    mask = causal_mask(8, 8, keys.device) if causal else None
    weights = attend_part(queries, keys, keys, scale=SCALE, mask=mask)[1]
    counted = torch.rand(2, 8) < 0.5 if pads else None
    found = attention_sums(queries, keys, weights, scale=SCALE, causal=causal, counted=counted)
    weights = written_out(queries, keys, causal=causal)
    if counted is not None:
        weights = weights * counted[:, None, None, :, None]
    wanted = weights.sum(dim=3).mean(dim=2)  # over queries, then over the query heads of a group
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_one_query_adds_what_it_adds_among_many():
    queries, keys = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 13, 8)
    weights = attend_part(queries, keys, keys, scale=SCALE, mask=None)[1]
    found = attention_sums(queries, keys, weights, scale=SCALE)
    everyone = torch.ones(2, 1, dtype=torch.bool)
    torch.testing.assert_close(found, attention_sums(queries, keys, weights, scale=SCALE, counted=everyone))
    torch.testing.assert_close(found.sum(dim=2), torch.ones(2, 3))


def test_every_counted_query_gives_a_sum_of_one():
    queries, keys = torch.randn(1, 2, 9, 4), torch.randn(1, 1, 20, 4)
    weights = attend_part(queries, keys, keys, scale=SCALE)[1]
    assert attention_sums(queries, keys, weights, scale=SCALE).sum().item() == pytest.approx(9, rel=1e-5)


def test_maxima_are_those_of_the_matrix_over_the_queries_that_see_a_slot():
    queries, keys = torch.randn(2, 4, 3, 6), torch.randn(2, 2, 7, 6)
    log_sum_exp = attend_part(queries, keys, keys, scale=SCALE)[1]
    seen = torch.rand(2, 3, 7) < 0.6
    seen[:, :, 2] = False
    found = max_attention_scores(queries, keys, log_sum_exp, scale=SCALE, seen=seen)
    weights = written_out(queries, keys) * seen[:, None, None]
    assert torch.allclose(found, weights.amax(dim=(2, 3)), rtol=1e-5, atol=1e-6)
    assert (found[:, :, 2] == 0).all()


def test_a_slot_that_all_queries_see_needs_no_column_of_the_mask():
    queries, keys = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4)
    log_sum_exp = attend_part(queries, keys, keys, scale=SCALE)[1]
    every = max_attention_scores(queries, keys, log_sum_exp, scale=SCALE, seen=torch.ones(1, 3, 5, dtype=torch.bool))
    one = max_attention_scores(queries, keys, log_sum_exp, scale=SCALE, seen=torch.ones(1, 3, 1, dtype=torch.bool))
    assert torch.equal(every, one)


def test_a_score_spreads_over_its_neighbours_and_fades_with_distance():
    scores = torch.zeros(1, 2, 9)
    scores[0, 1, 4] = 1.0
    found = pool_and_dilate(scores, pool=1, reach=2)[0]
    assert found.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert found[4] > found[3] == found[5] > found[2] == found[6]


def test_a_neighbour_of_a_high_score_outranks_the_top_of_a_lower_one():
    scores = torch.zeros(1, 1, 12)
    scores[0, 0, 2], scores[0, 0, 9] = 1.0, 0.99
    found = pool_and_dilate(scores, pool=1, reach=2)[0]
    assert found[:5].min() > found[9]


def test_pooling_averages_over_the_neighbours_that_are_there():
    scores = torch.tensor([[[3.0, 0.0, 0.0, 0.0, 6.0]]])
    found = pool_and_dilate(scores, pool=3, reach=0)[0]
    assert torch.allclose(found, torch.tensor([1.5, 1.0, 0.0, 2.0, 3.0]))
