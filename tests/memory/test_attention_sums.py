"""Sums of attention: those of the matrix written out, through forwards, folds, rows and pads."""

import pytest
import torch

from kvfold.attention.reference import attend_part
from kvfold.encode.dense import Dense
from kvfold.memory.attention_sums import AttentionSums, ReceivedAttention
from kvfold.memory.dense import DensePart
from memories import HEADS, QUERY_HEADS, SCALE, SIZE, Fed, fold_event, observed, slots, tail_of

GROUP = QUERY_HEADS // HEADS


def written_out(queries, keys, sees):
    """Attention that each slot receives, averaged over the query group, [B, H, S]."""
    scores = queries @ keys.repeat_interleave(GROUP, dim=1).mT * SCALE
    weights = scores.masked_fill(~sees, -torch.inf).softmax(dim=-1)
    return weights.sum(dim=2).unflatten(1, (-1, GROUP)).mean(dim=2)


def opened(rows=1):
    return AttentionSums().open(torch.empty(rows, HEADS, 0, SIZE))


def test_a_new_record_holds_no_sums():
    record = opened(rows=3)
    assert record.raw.shape == (3, HEADS, 0)
    assert record.counts == ((0, 0),) * 3


def test_sums_of_raw_tokens_are_those_of_the_matrix():
    tail = tail_of([[True] * 7])
    queries = torch.randn(1, QUERY_HEADS, 7, SIZE)
    record = opened().observe(observed(queries, tail))
    keys = tail.keys[:, :, :7]
    triangle = torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.allclose(record.raw, written_out(queries, keys, triangle), atol=1e-5)


def test_later_queries_add_to_earlier_tokens():
    tail = tail_of([[True] * 9])
    queries = torch.randn(1, QUERY_HEADS, 9, SIZE)
    whole = opened().observe(observed(queries, tail))
    first = opened().observe(observed(queries[:, :, :5], tail.cropped(5)))
    both = first.observe(observed(queries[:, :, 5:], tail))
    assert torch.allclose(both.raw, whole.raw, atol=1e-5)


def test_every_real_query_gives_away_one_and_pads_nothing():
    run = Fed("h2o(tokens=30)", rows=2)
    run.forward(8, seed=1, pads=True)
    record = run.memory.layers[0].state.records["attention_sums"]
    assert record.raw.sum(dim=2).flatten().tolist() == pytest.approx([8.0, 8.0, 7.0, 7.0], rel=1e-4)
    assert (record.raw[1, :, 7] == 0).all()


def test_folded_slots_go_on_receiving_attention():
    torch.manual_seed(3)
    tail = tail_of([[True] * 2])
    held = DensePart.of(slots(5), Dense())
    queries = torch.randn(1, QUERY_HEADS, 2, SIZE)
    every = torch.cat([held.read().keys, tail.keys[:, :, :2]], dim=2)
    sees = torch.cat([torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool).tril()], dim=1)
    log_sum_exp = attend_part(queries, every, every, scale=SCALE, mask=sees[None, None])[1]
    record = ReceivedAttention(raw=torch.zeros(1, HEADS, 0), folded=torch.ones(10), counts=((5, 5),))
    after = record.observe(observed(queries, tail, log_sum_exp=log_sum_exp, folded=held))
    wanted = written_out(queries, every, sees)
    assert torch.allclose(after.folded.view(1, HEADS, 5), 1 + wanted[:, :, :5], atol=1e-5)
    assert torch.allclose(after.raw, wanted[:, :, 5:], atol=1e-5)


def test_ragged_folded_slots_receive_what_each_head_would_alone():
    torch.manual_seed(4)
    counts = ((3, 1), (2, 2))
    kept = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [0, 1, 1]]], dtype=torch.bool)
    held = DensePart.of(slots(3, rows=2), Dense(), kept=kept)
    tail = tail_of([[True], [True]])
    queries = torch.randn(2, QUERY_HEADS, 1, SIZE)
    log_sum_exp = torch.zeros(2, QUERY_HEADS, 1)
    record = ReceivedAttention(raw=torch.zeros(2, HEADS, 0), folded=torch.zeros(8), counts=counts)
    after = record.observe(observed(queries, tail, log_sum_exp=log_sum_exp, folded=held))
    at = 0
    for row, of_heads in enumerate(counts):
        for head, count in enumerate(of_heads):
            keys = held.payload["keys"][at : at + count]
            of_group = queries[row, head * GROUP : (head + 1) * GROUP, 0]
            wanted = (of_group @ keys.T * SCALE).exp().mean(dim=0)
            assert torch.allclose(after.folded[at : at + count], wanted, rtol=1e-4)
            at += count


def test_a_fold_moves_the_sums_of_kept_columns_behind_those_of_the_slots_that_stay():
    tail = tail_of([[True] * 3])
    raw = torch.arange(6.0).view(1, HEADS, 3)  # head 0: 0 1 2, head 1: 3 4 5
    record = ReceivedAttention(raw=raw, folded=torch.tensor([10.0, 11.0, 20.0]), counts=((2, 1),))
    kept = torch.tensor([[[True, False], [True, True]]])
    history = torch.tensor([False, True, True])
    after = record.fold(fold_event(tail, 2, kept, history=history, counts=((2, 1),)))
    assert after.counts == ((2, 3),)
    assert after.folded.tolist() == [11.0, 0.0, 20.0, 3.0, 4.0]
    assert after.raw.flatten().tolist() == [2.0, 5.0]


def test_rows_are_picked_with_their_sums():
    record = ReceivedAttention(
        raw=torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]),
        folded=torch.tensor([10.0, 11.0, 20.0]),
        counts=((1, 1), (0, 1)),
    )
    picked = record.take_rows([1, 0, 1])
    assert picked.counts == ((0, 1), (1, 1), (0, 1))
    assert picked.folded.tolist() == [20.0, 10.0, 11.0, 20.0]
    assert picked.raw.flatten().tolist() == [3.0, 4.0, 1.0, 2.0, 3.0, 4.0]


def test_sums_of_a_rectangle_are_read_by_row_and_head():
    record = ReceivedAttention(raw=torch.zeros(2, 2, 0), folded=torch.arange(6.0), counts=((2, 1), (2, 1)))
    assert record.of_folded([1, 0], slice(0, 1)).tolist() == [[[3.0, 4.0]], [[0.0, 1.0]]]


def test_saved_sums_come_back_and_wrong_counts_are_refused():
    record = ReceivedAttention(raw=torch.zeros(1, 2, 3), folded=torch.arange(3.0), counts=((2, 1),))
    again = AttentionSums().restore(record.plain(), dict(record.tensors()))
    assert again.counts == record.counts
    assert torch.equal(again.folded, record.folded)
    with pytest.raises(ValueError, match="4 sums are promised, and 3 are there"):
        AttentionSums().restore({"counts": [[2, 2]]}, dict(record.tensors()))


def test_tokens_whose_attention_was_added_up_cannot_be_taken_back():
    assert not AttentionSums.allows_crop
    with pytest.raises(AssertionError):
        opened().crop([0], columns=1)
