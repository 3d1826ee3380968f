"""A running forward: after which columns it folds, what its layers share, and masks that contradict the cache."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.partial import Partial
from kvfold.errors import CacheError
from kvfold.memory.forward import Boundaries, Text
from kvfold.memory.layer import Layer
from memories import HEADS, LAYERS, SCALE, Fed, new_tokens


def marks(boundaries, chunks):
    """Every boundary that is met while these chunks are fed."""
    met, fed = [], 0
    for new in chunks:
        met += [fed + mark for mark in boundaries.within(fed, new)]
        fed += new
    return met


def test_the_prompt_and_then_every_stride():
    assert marks(Boundaries(prompt=10, stride=4), [25]) == [10, 14, 18, 22]
    assert marks(Boundaries(prompt=10), [25]) == [10]
    assert marks(Boundaries(prompt=0, stride=4), [9]) == [4, 8]
    assert marks(Boundaries(), [25]) == []


@settings(deadline=None)
@given(st.integers(0, 20), st.one_of(st.none(), st.integers(1, 9)), st.lists(st.integers(1, 12), max_size=12))
def test_chunks_change_nothing(prompt, stride, chunks):
    boundaries = Boundaries(prompt=prompt, stride=stride)
    whole = [sum(chunks)] if chunks else []
    assert marks(boundaries, chunks) == marks(boundaries, whole)
    assert marks(boundaries, [1] * sum(chunks)) == marks(boundaries, whole)


def test_the_first_forward_is_the_prompt_and_is_folded_at_its_end():
    run = Fed("streaming_llm(tokens=8)", prompt=None)
    run.forward(20, seed=1)
    assert run.kept(0) == [[[0, 1, 2, 3, 16, 17, 18, 19]] * HEADS]
    run.forward(3, seed=2)
    assert len(run.kept(0)[0][0]) == 11


def test_a_forward_folds_inside_at_every_stride():
    run = Fed("streaming_llm(tokens=8)", prompt=None, stride=5)
    run.forward(10, seed=1)
    run.forward(12, seed=2)
    assert run.kept(0) == [[[0, 1, 2, 3, 16, 17, 18, 19, 20, 21]] * HEADS]  # folded after 20, then two raw


def test_chunks_of_a_text_are_folded_as_the_text_in_one():
    whole, pieces = (Fed("streaming_llm(tokens=9)", prompt=7, stride=5) for _ in range(2))
    whole.forward(23, seed=1)
    for count in (3, 11, 1, 8):
        pieces.forward(count, seed=2)
    assert whole.kept(2) == pieces.kept(2)


def test_nothing_is_folded_where_a_fold_changes_nothing():
    run = Fed("full", prompt=None, stride=4)
    run.forward(20, seed=1)
    assert run.memory.layers[0].state.tail.length == 20


def test_ids_join_the_transcript_once_the_forward_ends():
    run = Fed("kvzip(keep=0.5)")
    run.forward(3, seed=1, text=Text(ids=torch.tensor([[7, 8, 9]])), layers=LAYERS[:1])
    assert run.memory.transcript.ids is None
    run = Fed("kvzip(keep=0.5)")
    run.forward(3, seed=1, text=Text(ids=torch.tensor([[7, 8, 9]])))
    assert run.memory.transcript.ids.tolist() == [[7, 8, 9]]


def test_classes_are_read_by_the_first_layer_and_seen_by_all():
    run = Fed("sentkv(budget=0.3)")
    running = run.memory.begin(3, text=Text(classes=torch.tensor([[1, 2, 3]], dtype=torch.uint8)))
    assert running.scope.transcript.classes is None
    running.attend(LAYERS[0], new_tokens(3), scale=SCALE)
    assert running.scope.transcript.classes_at(0, torch.arange(3)) == bytes([1, 2, 3])


def test_classes_that_no_rule_reads_are_not_kept():
    run = Fed("full")
    running = run.memory.begin(3, text=Text(classes=torch.tensor([[1, 2, 3]], dtype=torch.uint8)))
    running.attend(LAYERS[0], new_tokens(3), scale=SCALE)
    assert running.scope.transcript.classes is None


def test_layers_see_the_folded_parts_of_all_once_all_have_folded():
    run = Fed("snapkv(tokens=8)")
    running = run.memory.begin(1)
    assert running.scope.folded_parts() == []
    run.lived()
    running = run.memory.begin(1)
    assert len(running.scope.folded_parts()) == len(LAYERS)


def test_a_mask_that_takes_back_folded_tokens_is_refused():
    run = Fed("streaming_llm(tokens=99)", rows=2)
    run.forward(4, seed=1)
    run.memory.fold()
    run.mask[1, 3] = False
    with pytest.raises(
        CacheError, match=r"rows of \[4, 3\] real tokens .* the cache has seen \[4, 4\]; give the whole"
    ):
        run.forward(1, seed=2)


def test_rows_with_pads_need_a_mask():
    run = Fed("full", rows=2)
    run.forward(4, seed=1, pads=True)
    running = run.memory.begin(1)
    with pytest.raises(CacheError, match="no mask: all are real"):
        running.attend(0, new_tokens(1, rows=2, first=4), scale=SCALE)


def test_a_later_mask_takes_back_columns_that_were_pads():
    run = Fed("full", rows=2)
    run.forward(4, seed=1)
    run.mask[1, 2:] = False
    run.forward(1, seed=2)
    assert run.memory.seen == (5, 3)
    assert run.kept(0)[1] == [[0, 1, 2]] * HEADS


@pytest.mark.parametrize("plan", ["full", "h2o(tokens=8)"])
def test_a_token_that_attended_elsewhere_is_followed_as_if_it_had_attended_here(plan):
    here, there = (Fed(plan, rows=2, stride=3, prompt=9) for _ in range(2))
    for run in (here, there):
        run.forward(9, seed=1)
    for seed in range(2, 9):
        before = {index: layer.state for index, layer in here.memory.layers.items()}
        here.forward(1, seed=seed)
        running = there.memory.begin(1)
        torch.manual_seed(seed)
        for index, layer in there.memory.layers.items():
            new = new_tokens(1, rows=2, first=torch.full((2,), there.memory.fed))
            tail = layer.state.tail.ahead(1)
            tail.keys[:, :, tail.length : tail.length + 1] = new.keys
            tail.values[:, :, tail.length : tail.length + 1] = new.values
            layer.state = replace(layer.state, tail=tail)
            twin = Layer(index, layer.rules)  # attends, and is thrown away
            twin.state = before[index]
            output = twin.attend(new, scale=SCALE, forward=running.scope)
            known = twin.state.pending
            sums = torch.zeros(output.shape[:3]) if known is None else known.log_sum_exp[-1]
            running.follow(index, new, Partial(output, sums), scale=SCALE)
        there.memory.commit()
    assert there.memory.seen == here.memory.seen == (16, 16)
    for index, layer in there.memory.layers.items():
        found, wanted = layer.state, here.memory.layers[index].state
        assert found.folded_of_rows == wanted.folded_of_rows
        assert found.tail.length == wanted.tail.length
        assert torch.equal(found.tail.keys[:, :, : found.tail.length], wanted.tail.keys[:, :, : found.tail.length])
        assert torch.equal(found.tail.positions[:, : found.tail.length], wanted.tail.positions[:, : found.tail.length])
        for name, record in found.records.items():
            for (inner, one), (_, other) in zip(record.tensors(), wanted.records[name].tensors(), strict=True):
                assert torch.allclose(one, other, atol=1e-5), inner
