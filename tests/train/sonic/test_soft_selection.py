"""Selection in training: sharp, the soft one is the choice of use; budgets are respected; a loss reaches the scores."""

import random
from unittest.mock import Mock

import pytest
import torch

from kvfold.adapters.adapter import Adapter
from kvfold.select.sonic import compete
from kvfold.train.sonic.budgets import DrawnBudgets
from kvfold.train.sonic.parallel_masks import Layout
from kvfold.train.sonic.row_attention import RowAttention
from kvfold.train.sonic.soft_selection import GONE, HardChoice, SoftChoice, folded_segments, log_weights, places_of_rows
from kvfold.train.sonic.talk_batch import NONE, Talk, batch_talks

LAYERS, HEADS = 2, 3
GONE_WEIGHT = 2.718281828**GONE
ALL_GONE = DrawnBudgets(raw=0.0, gone=1.0)
ALL_STAY = DrawnBudgets(raw=1.0, gone=0.0)
A_THIRD = DrawnBudgets(least=0.3, most=0.3, raw=0.0, gone=0.0)


def batch():
    talks = [Talk(ids=range(30), weights=[1.0] * 30, ends=[12, 22]), Talk(ids=range(20), weights=[1.0] * 20, ends=[9])]
    return batch_talks(talks, sinks=4, longest_jump=0, rng=random.Random(0), pad=0)


def weighed(budgets, choice, *, scores=None, rows=True):
    """The layout of the batch, what its budgets leave, and the weights of a choice."""
    talks = batch()
    torch.manual_seed(0)
    scores = torch.rand(2, 2, LAYERS, HEADS, talks.ids.shape[1]) if scores is None else scores
    folded = folded_segments(talks, budgets, random.Random(1))
    layout = Layout.of(talks, places_of_rows(scores[1], folded) if rows else [[], []])
    return layout, folded, log_weights(layout, scores, folded, choice)


@pytest.mark.parametrize("rows", [True, False])
def test_sharp_and_without_noise_the_soft_choice_is_the_one_of_use(monkeypatch, rows):
    monkeypatch.setattr("kvfold.train.sonic.soft_selection._NOISE", 0.0)
    torch.manual_seed(5)
    scores = 100 * torch.rand(2, 2, LAYERS, HEADS, batch().ids.shape[1])
    _, _, soft = weighed(A_THIRD, SoftChoice(random.Random(2), done=1.0), scores=scores, rows=rows)
    choice = HardChoice()
    _, folded, hard = weighed(A_THIRD, choice, scores=scores, rows=rows)
    assert torch.equal(soft.exp() > 0.5, hard.exp() > 0.5)
    assert choice.kept == sum(one.slots for of_talk in folded for one in of_talk) * LAYERS * HEADS
    assert (choice.rows > 0) == rows


def test_as_used_the_choice_is_hard_and_what_is_gone_has_the_gradient_of_its_weight(monkeypatch):
    monkeypatch.setattr("kvfold.train.sonic.soft_selection._NOISE", 0.0)
    slots = torch.rand(LAYERS, HEADS, 12, requires_grad=True)
    choose = SoftChoice(random.Random(2), done=0.0, as_used=True)
    logs, _ = choose(slots, slots.detach() - 0.3, 4)
    assert set(logs.detach().unique().tolist()) == {GONE, 0.0}
    logs.exp().sum().backward()
    assert slots.grad is not None
    assert (slots.grad[logs == GONE] > 0).any()


@pytest.mark.parametrize("as_used", [False, True])
def test_a_slot_and_its_row_share_the_weight_of_their_token(monkeypatch, as_used):
    monkeypatch.setattr("kvfold.train.sonic.soft_selection._NOISE", 0.0)
    slots = torch.rand(LAYERS, HEADS, 12)
    without = torch.full_like(slots, -torch.inf)
    rows = torch.where(torch.arange(12) % 3 == 0, slots - 0.05, without)
    alone, together = (
        SoftChoice(random.Random(2), done=0.5, as_used=as_used)(slots, given, 4) for given in (without, rows)
    )
    torch.testing.assert_close(together[0].exp() + together[1].exp(), alone[0].exp() + GONE_WEIGHT, rtol=0, atol=3e-6)


def test_sinks_and_the_open_segment_always_stay():
    _, _, logs = weighed(DrawnBudgets(), SoftChoice(random.Random(2), done=0.0))
    assert not logs[..., :4].any()
    assert not logs[0, ..., 22:32].any()
    assert not logs[1, ..., 9:32].any()
    assert (logs <= 0).all()


@pytest.mark.parametrize(("budgets", "weight"), [(ALL_GONE, GONE), (ALL_STAY, 0.0)])
def test_segments_may_go_or_stay_whole(budgets, weight):
    layout, _, logs = weighed(budgets, SoftChoice(random.Random(2), done=0.5))
    assert (logs[0, ..., 4:22] == weight).all()
    assert layout.segment.shape[1] == layout.count, "no row runs where there is nothing to choose"


def test_a_loss_reaches_the_scores_of_slots_and_of_rows_that_run():
    scores = torch.rand(2, 2, LAYERS, HEADS, batch().ids.shape[1], requires_grad=True)
    layout, _, logs = weighed(A_THIRD, SoftChoice(random.Random(3), done=0.0), scores=scores)
    logs.sum().backward()
    assert scores.grad is not None
    slots, rows = scores.grad
    assert (slots[0, ..., 4:22] > 0).any()
    assert not slots[0, ..., 22:].any()
    run = set(layout.column[0, layout.count :].tolist())
    moved = rows[0].abs().sum(dim=(0, 1)).nonzero().flatten().tolist()
    assert moved
    assert set(moved) <= run


def test_rows_run_at_as_many_tokens_as_there_are_slots_and_at_the_best_ones():
    scores = torch.rand(LAYERS, HEADS, 20)
    kept, made = compete(scores, scores + 0.01, 4)
    at = made.any(dim=0).any(dim=0).nonzero().flatten()
    assert len(at) <= 4
    assert set(at.tolist()) <= set(scores.amax(dim=(0, 1)).topk(4).indices.tolist())
    assert int(kept.sum()) + int(made.sum()) == 4 * LAYERS * HEADS


def with_masks(layout, logs, queries, keys, values):
    """The slow reference of RowAttention's product: every weight is added to the attention scores as they stand."""
    visible = layout.visible()[:, None]
    earlier = layout.segment[:, None] < layout.segment[:, :, None]
    added = torch.where(earlier[:, None] & visible, logs[:, 0, :, None], 0.0).masked_fill(~visible, -torch.inf)
    scores = queries @ keys.repeat_interleave(2, dim=1).mT / 4 + added.repeat_interleave(2, dim=1)
    return scores.softmax(-1) @ values.repeat_interleave(2, dim=1)


def without_gates():
    adapter = Mock(spec=Adapter)
    adapter.gate.return_value = torch.zeros(2 * HEADS)
    return adapter


def test_weights_as_dimensions_are_weights_added_to_attention_scores_gradients_included():
    layout, _, logs = weighed(A_THIRD, SoftChoice(random.Random(2), done=0.3))
    rows = layout.segment.shape[1]
    attend = RowAttention(without_gates(), layout, logs, [7, 9])
    given = [torch.randn(2, heads, rows, 16, requires_grad=True) for heads in (2 * HEADS, HEADS, HEADS)]
    weights = logs.clone().requires_grad_()
    attend.logs[7] = weights[:, 0]
    results = []
    for output in (attend(7, *given, 0.25), with_masks(layout, weights, *given)):
        results.append([output, *torch.autograd.grad((output * output).sum(), [*given, weights])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_slot_that_is_gone_leaves_nothing_and_no_gradient_that_is_no_number():
    layout, _, logs = weighed(A_THIRD, HardChoice())
    rows = layout.segment.shape[1]
    attend = RowAttention(without_gates(), layout, logs, [7, 9])
    given = [torch.randn(2, heads, rows, 16, requires_grad=True) for heads in (2 * HEADS, HEADS, HEADS)]
    output = attend(7, *given, 0.25)
    torch.testing.assert_close(output, with_masks(layout, logs, *given), rtol=1e-5, atol=1e-6)
    assert all(found.isfinite().all() for found in torch.autograd.grad(output.sum(), given))


def test_what_is_seen_is_causal():
    layout, _, _ = weighed(ALL_GONE, SoftChoice(random.Random(2), done=0.5))
    visible = layout.visible()
    size = layout.segment.shape[1]
    assert visible.shape == (2, size, size)
    assert bool(visible[0, 25, 5])
    assert not visible[0, 5, 10]
    assert layout.segment[1, 25] == NONE
    assert bool(visible[1, 25, 25])
    sliding = layout.window_mask(3)[0, 0]
    assert [bool(sliding[10, key]) for key in (7, 8, 10, 11)] == [False, True, True, False]


def test_rows_see_what_their_tokens_see_and_nobody_of_their_segment_sees_them():
    layout, _, _ = weighed(A_THIRD, HardChoice())
    visible = layout.visible()[0]
    rows = (layout.segment[0] != NONE).nonzero().flatten()
    rows = rows[rows >= layout.count]
    for row in rows.tolist():
        token = int(layout.column[0, row])
        assert torch.equal(visible[row, : layout.count], visible[token, : layout.count])
        same = layout.segment[0] == layout.segment[0, row]
        assert not visible[same, row].any()
        later = layout.later()[0, row - layout.count]
        assert later.nonzero().flatten().tolist() == [at for at in range(32) if at > token and bool(same[at])]
