"""Scores that are bent towards a cap: in every way of attending, in every score, and in copies of the scale."""

import copy
import pickle

import pytest
import torch

from kvfold.attention import partial as module
from kvfold.attention.partial import partial
from kvfold.attention.reference import causal_mask
from kvfold.attention.scores import attention_sums, max_attention_scores
from kvfold.attention.soft_cap import CappedScale, cap_of, capped, with_cap

SCALE, CAP = 0.7, 1.5
BENT = CappedScale(SCALE, CAP)


def weights_and_sums(queries, keys, mask=None):
    """The attention matrix [B, G, Q, S] and its log-sum-exp, as Gemma 2 writes it."""
    group = queries.shape[1] // keys.shape[1]
    scores = queries @ keys.repeat_interleave(group, dim=1).mT * SCALE
    scores = torch.tanh(scores / CAP) * CAP
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1), scores.logsumexp(dim=-1)


def test_a_scale_without_a_cap_is_a_plain_number():
    assert type(with_cap(SCALE, None)) is float
    assert cap_of(SCALE) is None
    scores = torch.randn(3)
    assert capped(scores, SCALE) is scores


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda scale: pickle.loads(pickle.dumps(scale))])
def test_copies_of_a_scale_keep_its_cap(copied):
    found = copied(BENT)
    assert (float(found), cap_of(found)) == (SCALE, CAP)


@pytest.mark.parametrize("at_once", [1 << 26, 60])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_a_part_bends_its_scores(monkeypatch, causal, at_once):
    monkeypatch.setattr(module, "_SCORES", at_once)
    queries, keys, values = torch.randn(2, 4, 9, 6), torch.randn(2, 2, 9, 6), torch.randn(2, 2, 9, 6)
    weights, sums = weights_and_sums(queries, keys, causal_mask(9, 9, keys.device) if causal else None)
    with torch.no_grad():
        found = partial(queries, keys, values, scale=BENT, causal=causal)
    assert torch.allclose(found.output, weights @ values.repeat_interleave(2, dim=1), atol=1e-5)
    assert torch.allclose(found.log_sum_exp, sums, atol=1e-5)


def test_pads_stay_hidden_where_queries_are_attended_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_SCORES", 40)
    queries, keys = torch.randn(2, 2, 9, 6), torch.randn(2, 2, 9, 6)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, :, :, :4] = False
    wanted = weights_and_sums(queries, keys, mask)[0] @ keys
    with torch.no_grad():
        found = partial(queries, keys, keys, scale=BENT, mask=mask)
    assert torch.allclose(found.output, wanted, atol=1e-5)


def test_sums_and_maxima_of_attention_are_those_of_bent_scores():
    queries, keys = torch.randn(1, 4, 8, 6), torch.randn(1, 2, 11, 6)
    weights, sums = weights_and_sums(queries, keys)
    by_head = weights.unflatten(1, (2, 2))  # B H group Q S
    found = attention_sums(queries, keys, sums, scale=BENT)
    assert torch.allclose(found, by_head.sum(dim=3).mean(dim=2), atol=1e-5)
    seen = torch.ones(1, 8, 11, dtype=torch.bool)
    highest = max_attention_scores(queries, keys, sums, scale=BENT, seen=seen)
    assert torch.allclose(highest, by_head.amax(dim=(2, 3)), atol=1e-5)
