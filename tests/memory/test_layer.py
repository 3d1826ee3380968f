"""One layer: sinks, folded part and tail together answer what attention over all of them would."""

import contextlib

import pytest
import torch

from kvfold.memory.layer import Layer
from kvfold.memory.step import ForwardScope
from kvfold.memory.transcript import Transcript
from memories import HEADS, SCALE, Fed, new_tokens, rules_of, slots


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (5, 1, 1, 9, 4), (1,) * 8])
def test_chunks_answer_what_the_whole_text_answers(sizes):
    run = Fed("full")
    for seed, count in enumerate(sizes):
        found = run.forward(count, seed=seed)
        assert close(found[1], run.exact(2, newest=count))


@pytest.mark.parametrize("sizes", [(9, 6), (9, 1, 1)])
def test_padded_rows_answer_as_if_their_pads_were_not_there(sizes):
    run = Fed("full", rows=3)
    for seed, count in enumerate(sizes):
        found = run.forward(count, seed=seed, pads=count > 3)
        real = run.mask[:, -count:]
        wanted = run.exact(0, newest=count)
        assert close(found[0].transpose(1, 2)[real], wanted.transpose(1, 2)[real])


def test_a_fold_that_keeps_everything_changes_no_answer():
    run = Fed("streaming_llm(tokens=99)")
    for seed, count in enumerate((12, 5)):
        run.forward(count, seed=seed)
        run.memory.fold()
    found = run.forward(3, seed=9)
    assert run.memory.layers[0].state.tail.length == 3
    assert close(found[0], run.exact(0, newest=3))


def test_one_token_after_a_fold_attends_to_sinks_folded_part_and_tail():
    run = Fed("streaming_llm(tokens=99)").lived()
    for seed in range(3):
        assert close(run.forward(1, seed=seed)[0], run.exact(0, newest=1))


def test_a_long_tail_is_not_copied_behind_the_sinks_and_answers_the_same(monkeypatch):
    near, far = (Fed("streaming_llm(tokens=99)").lived() for _ in range(2))
    monkeypatch.setattr("kvfold.memory.layer._NEAR", 0)
    apart = far.forward(1, seed=3)
    monkeypatch.undo()
    assert close(near.forward(1, seed=3), apart)


def test_long_padded_forwards_are_cut_into_pieces_and_answer_the_same(monkeypatch):
    whole, pieces = (Fed("full", rows=2) for _ in range(2))
    wanted = whole.forward(11, seed=1, pads=True)
    monkeypatch.setattr("kvfold.memory.layer._PADDED_PIECE", 4)
    found = pieces.forward(11, seed=1, pads=True)
    real = whole.mask
    assert close(found[0].transpose(1, 2)[real], wanted[0].transpose(1, 2)[real])


def test_a_piece_of_new_tokens_has_its_share_of_everything():
    valid = torch.tensor([[True, True, True, False]])
    new = new_tokens(4, first=5, valid=valid, hidden_states=torch.randn(1, 4, 3))
    piece = new.piece(1, 4)
    assert piece.queries.shape[2] == 3
    assert torch.equal(piece.queries, new.queries[:, :, 1:])
    assert piece.positions.tolist() == [[6, 7, 8]]
    assert piece.valid.tolist() == [[True, True, False]]
    assert torch.equal(piece.hidden_states, new.hidden_states[:, 1:])


def test_folding_at_stops_is_folding_between_forwards():
    inside, between = (Layer(0, rules_of("streaming_llm(tokens=7)")) for _ in range(2))
    new = new_tokens(12)
    inside.attend(new, scale=SCALE, forward=ForwardScope(), stops=[8])
    between.attend(new.piece(0, 8), scale=SCALE, forward=ForwardScope())
    between.fold(Transcript())
    between.attend(new.piece(8, 12), scale=SCALE, forward=ForwardScope())
    pairs = zip(inside.state.tensors(), between.state.tensors(), strict=True)
    assert all(name == other_name for (name, _), (other_name, _) in pairs)
    assert inside.state.folded.positions.tolist() == between.state.folded.positions.tolist()
    assert inside.state.tail.length == between.state.tail.length == 4


def test_a_layer_that_saw_nothing_has_nothing_to_fold():
    layer = Layer(0, rules_of("streaming_llm(tokens=7)"))
    layer.fold(Transcript())
    assert layer.state.seen == ()


def test_loaded_slots_are_attended_as_if_they_had_been_fed():
    fed, loaded = (Layer(0, rules_of("full")) for _ in range(2))
    past, new = new_tokens(6), new_tokens(2, first=6)
    fed.attend(past, scale=SCALE, forward=ForwardScope())
    loaded.load(past.keys, past.values, start=0)
    assert loaded.state.seen == (6,)
    wanted = fed.attend(new, scale=SCALE, forward=ForwardScope())
    assert close(loaded.attend(new, scale=SCALE, forward=ForwardScope()), wanted)


def test_loads_follow_each_other():
    layer = Layer(0, rules_of("full"))
    first, second = slots(4), slots(3)
    layer.load(first.keys, first.values, start=0)
    layer.load(second.keys, second.values, start=4)
    assert layer.state.tail.positions[0, :7].tolist() == list(range(7))
    assert layer.state.seen == (7,)


def test_a_timer_is_entered_around_appending_and_folding():
    stages = []

    @contextlib.contextmanager
    def timer(stage):
        stages.append(stage)
        yield

    layer = Layer(0, rules_of("streaming_llm(tokens=7)"))
    layer.timer = timer
    layer.attend(new_tokens(9), scale=SCALE, forward=ForwardScope())
    layer.fold(Transcript())
    assert stages == ["append", "fold"]


def test_records_are_opened_by_the_first_tokens_and_follow_them():
    layer = Layer(0, rules_of("snapkv(keep=0.5, window=3)"))
    layer.attend(new_tokens(5), scale=SCALE, forward=ForwardScope())
    layer.attend(new_tokens(1, first=5), scale=SCALE, forward=ForwardScope())
    assert layer.state.recent.positions.tolist() == [[3, 4, 5]]


def test_raw_tokens_above_the_limit_are_offloaded_and_nothing_is_lost():
    run = Fed("sentkv(budget=1.0)")
    limit = run.memory.rules.offload_above
    run.forward(limit + 1, seed=1)
    state = run.memory.layers[0].state
    assert state.tail.length == limit // 2
    assert run.kept(0) == [[list(range(limit + 1))] * HEADS]
    assert close(run.forward(1, seed=2)[0], run.exact(0, newest=1))


def test_gradients_are_not_kept_by_records():
    layer = Layer(0, rules_of("h2o(keep=0.5)"))
    new = new_tokens(4)
    new.queries.requires_grad_()
    layer.attend(new, scale=SCALE, forward=ForwardScope())
    assert not layer.state.records["attention_sums"].raw.requires_grad
