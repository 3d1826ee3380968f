"""Soft selection: sharp, it is the choice of use; it respects budgets; a loss reaches the scores."""

import random

import pytest
import torch

from kvfold.select.base import top_slots
from kvfold.train.sonic.budgets import DrawnBudgets
from kvfold.train.sonic.soft_selection import log_weights, soft_masks
from kvfold.train.sonic.talk_batch import NONE, Talk, batch_talks

LAYERS, HEADS = 2, 3


def batch():
    talks = [Talk(ids=range(30), weights=[1.0] * 30, ends=[12, 22]), Talk(ids=range(20), weights=[1.0] * 20, ends=[9])]
    return batch_talks(talks, sinks=4, longest_jump=0, rng=random.Random(0), pad=0)


def test_sharp_and_without_noise_it_is_the_choice_of_use(monkeypatch):
    monkeypatch.setattr("kvfold.train.sonic.soft_selection._NOISE", 0.0)
    budgets = DrawnBudgets(least=0.5, most=0.5, raw=0.0, gone=0.0)
    talks, scores = batch(), torch.rand(2, LAYERS, HEADS, 32)
    logs = log_weights(talks, 100 * scores, budgets=budgets, rng=random.Random(1), done=1.0)
    kept = logs[0, ..., 4:12].exp() > 0.5
    slots = int(kept.sum()) // (LAYERS * HEADS)
    assert 1 <= slots < 8
    assert torch.equal(kept, top_slots(scores[0, ..., 4:12], slots))


def test_sinks_and_the_open_segment_always_stay():
    budgets = DrawnBudgets()
    logs = log_weights(batch(), torch.rand(2, LAYERS, HEADS, 32), budgets=budgets, rng=random.Random(2), done=0.0)
    assert not logs[..., :4].any()
    assert not logs[0, ..., 22:].any()
    assert not logs[1, ..., 9:].any()
    assert (logs <= 0).all()


@pytest.mark.parametrize("slots", ["gone", "raw"])
def test_segments_may_go_or_stay_whole(slots):
    budgets = DrawnBudgets(raw=float(slots == "raw"), gone=float(slots == "gone"))
    logs = log_weights(batch(), torch.rand(2, LAYERS, HEADS, 32), budgets=budgets, rng=random.Random(2), done=0.5)
    assert (logs[0, ..., 4:22] == (0.0 if slots == "raw" else -14.0)).all()


def test_a_loss_reaches_the_scores():
    budgets = DrawnBudgets(least=0.3, most=0.3, raw=0.0, gone=0.0)
    scores = torch.rand(2, LAYERS, HEADS, 32, requires_grad=True)
    log_weights(batch(), scores, budgets=budgets, rng=random.Random(3), done=0.0).sum().backward()
    assert scores.grad is not None
    assert (scores.grad[0, ..., 4:22] > 0).any()
    assert not scores.grad[0, ..., 22:].any()


def test_masks_are_causal_and_only_later_segments_miss_what_is_gone():
    budgets = DrawnBudgets(raw=0.0, gone=1.0)
    talks = batch()
    logs = log_weights(talks, torch.rand(2, LAYERS, HEADS, 32), budgets=budgets, rng=random.Random(2), done=0.5)
    masks = soft_masks(talks, logs, folding=[0, 2], layers=3, window=3)
    whole = masks[0]
    assert whole.shape == (2, HEADS, 32, 32)
    assert torch.equal(masks[0], masks[2])
    later, own = whole[0, 0, 25, 5], whole[0, 0, 10, 5]
    assert (float(later), float(own)) == (-14.0, 0.0)
    assert whole[0, 0, 5, 10] == -torch.inf
    assert talks.segment[1, 25] == NONE
    assert whole[1, 0, 25, 25] == 0
    sliding = masks[1][0, 0]
    assert [float(sliding[10, key]) for key in (7, 8, 10, 11)] == [-torch.inf, 0.0, 0.0, -torch.inf]
