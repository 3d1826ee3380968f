"""A memory as a whole: forwards are kept or undone, moments come back, forks part, and interrupted folds go on."""

import pytest
import torch

from kvfold.errors import CacheError
from kvfold.memory.forward import Reading
from kvfold.memory.snapshot import take
from memories import HEADS, LAYERS, Fed, rules_of

PAGES = "sentkv(budget=16, length=5, window=2, recent=2)"
PLANS = ["full", "streaming_llm(tokens=12)", "snapkv(keep=0.5, window=16)", "h2o(keep=0.5)", PAGES, "int8"]
CROPPABLE = [plan for plan in PLANS if "h2o" not in plan]


def raw_keys(state):
    """The keys of a layer's tail, slack included."""
    assert state.tail is not None
    return state.tail.keys


def same(one, other):
    """Whether two memories hold the same numbers, slack apart."""
    mine, theirs = (take(run.memory) for run in (one, other))
    assert mine.plain == theirs.plain
    assert mine.tensors.keys() == theirs.tensors.keys()
    return all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in mine.tensors.items())


def test_nothing_is_seen_before_the_first_forward():
    run = Fed("full")
    assert run.memory.seen == ()
    assert run.memory.fed == 0


def test_columns_are_counted_when_a_forward_is_kept():
    run = Fed("full", rows=2)
    run.forward(5, seed=1, pads=True)
    assert run.memory.fed == 5
    assert run.memory.seen == (5, 4)


def test_a_forward_must_begin_before_it_is_kept():
    with pytest.raises(AssertionError, match="no forward has begun"):
        Fed("full").memory.commit()


@pytest.mark.parametrize("plan", PLANS)
def test_a_forward_that_never_ended_is_undone_by_the_next(plan):
    broken, calm = Fed(plan).lived(), Fed(plan).lived()
    broken.forward(7, seed=5, layers=LAYERS[:1])
    assert torch.equal(broken.forward(3, seed=6), calm.forward(3, seed=6))
    assert same(broken, calm)


@pytest.mark.parametrize("plan", PLANS)
def test_a_moment_comes_back_whatever_happened_since(plan):
    run, calm = Fed(plan).lived(), Fed(plan).lived()
    mark = run.memory.mark()
    mask = run.mask
    run.forward(4, seed=5)
    run.memory.fold()
    run.forward(70, seed=6)
    run.memory.restore(mark)
    run.mask = mask
    assert torch.equal(run.forward(3, seed=7), calm.forward(3, seed=7))
    assert same(run, calm)


@pytest.mark.parametrize("plan", PLANS)
def test_a_moment_can_come_back_twice(plan):
    run = Fed(plan).lived()
    mark, mask = run.memory.mark(), run.mask
    first = run.forward(3, seed=5)
    run.memory.restore(mark)
    run.mask = mask
    second = run.forward(3, seed=5)
    assert torch.equal(first, second)


@pytest.mark.parametrize("plan", PLANS)
def test_a_fork_goes_its_own_way(plan):
    run, calm = Fed(plan).lived(), Fed(plan).lived()
    twin = Fed(plan)
    twin.memory, twin.mask, twin.tokens = run.memory.fork(), run.mask, dict(run.tokens)
    twin.forward(20, seed=8)
    twin.memory.fold()
    assert torch.equal(run.forward(3, seed=5), calm.forward(3, seed=5))
    run.memory.fold()
    calm.memory.fold()
    assert same(run, calm)


def test_a_fork_shares_what_was_folded_and_copies_what_is_raw():
    run = Fed("streaming_llm(tokens=12)").lived()
    mine, theirs = run.memory.layers[0].state, run.memory.fork().layers[0].state
    assert theirs.folded is mine.folded
    assert raw_keys(theirs).data_ptr() != raw_keys(mine).data_ptr()


@pytest.mark.parametrize("plan", CROPPABLE)
def test_cropped_tokens_are_as_if_they_had_never_been(plan):
    run, calm = Fed(plan).lived(), Fed(plan).lived()
    run.forward(4, seed=5)
    run.memory.crop(4)
    run.mask = run.mask[:, :-4]
    assert run.memory.fed == calm.memory.fed
    assert run.memory.seen == calm.memory.seen
    assert torch.equal(run.forward(3, seed=6), calm.forward(3, seed=6))
    assert run.kept(0) == calm.kept(0)


def test_a_crop_of_too_much_changes_no_layer():
    run = Fed("streaming_llm(tokens=12)").lived()
    before = run.kept(0)
    with pytest.raises(CacheError, match="only the newest 6 are still raw"):
        run.memory.crop(7)
    assert run.kept(0) == before
    assert run.memory.fed == 30


def test_tokens_that_were_added_up_cannot_be_cropped():
    with pytest.raises(CacheError, match="attention was already added up"):
        Fed("h2o(keep=0.5)").lived().memory.crop(1)


def test_a_crop_writes_over_nothing_that_a_moment_refers_to():
    run = Fed("full")
    run.forward(8, seed=1)
    mark = run.memory.mark()
    held = raw_keys(mark.states[0])[:, :, :8].clone()
    run.memory.crop(3)
    run.mask = run.mask[:, :-3]
    run.forward(3, seed=2)
    assert torch.equal(raw_keys(mark.states[0])[:, :, :8], held)


@pytest.mark.parametrize("back", ["restore", "crop"])
def test_the_text_that_a_moment_refers_to_is_not_written_over(back):
    run = Fed("sentkv(budget=0.3)")
    run.with_text(4, seed=1, classes=[1, 1, 1, 1])
    low = run.memory.mark()
    run.with_text(3, seed=2, classes=[7, 7, 7])
    high = run.memory.mark()
    if back == "restore":
        run.memory.restore(low)
    else:
        run.memory.crop(3)
    run.mask = run.mask[:, :4]
    run.with_text(3, seed=3, classes=[2, 2, 2])
    assert run.memory.transcript.classes_at(0, torch.arange(7)) == bytes([1] * 4 + [2] * 3)
    run.memory.restore(high)
    assert run.memory.transcript.classes_at(0, torch.arange(7)) == bytes([1] * 4 + [7] * 3)


@pytest.mark.parametrize("plan", PLANS)
def test_rows_are_picked_in_any_order_and_more_than_once(plan):
    run = Fed(plan, rows=3).lived(pads=True)
    before = run.kept(0)
    run.memory.take_rows([2, 0, 2])
    run.mask = run.mask[[2, 0, 2]]
    assert run.kept(0) == [before[2], before[0], before[2]]
    found = run.forward(2, seed=5)
    assert found.shape[1] == 3


def test_rows_of_an_empty_memory_are_nothing():
    run = Fed("full")
    run.memory.take_rows([0, 0])
    assert run.memory.seen == ()


@pytest.mark.parametrize("plan", ["streaming_llm(tokens=12)", "snapkv(keep=0.5, window=4)", "int8"])
def test_tokens_that_may_be_taken_back_are_folded_by_the_next_forward_only(plan):
    run = Fed(plan, prompt=None, stride=4)
    run.forward(20, seed=1, reading=Reading(candidates=None))
    assert run.memory.layers[0].state.folded is None
    run.forward(1, seed=2)
    assert run.memory.layers[0].state.folded is not None


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("goes_on", ["forward", "fold"])
def test_an_interrupted_fold_goes_on_before_anything_else(monkeypatch, goes_on):
    run, calm = (Fed("streaming_llm(tokens=9)") for _ in range(2))
    for one in (run, calm):
        one.forward(20, seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(run.memory.layers[LAYERS[1]], "fold", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.memory.fold()
    assert run.kept(LAYERS[0]) != run.kept(LAYERS[1])
    calm.memory.fold()
    if goes_on == "forward":
        assert torch.equal(run.forward(2, seed=2), calm.forward(2, seed=2))
    else:
        run.memory.fold()
    assert same(run, calm)


def test_a_moment_before_an_interrupted_fold_comes_back_without_it(monkeypatch):
    run, calm = (Fed("streaming_llm(tokens=9)") for _ in range(2))
    for one in (run, calm):
        one.forward(20, seed=1)
    mark = run.memory.mark()
    with monkeypatch.context() as patched:
        patched.setattr(run.memory.layers[LAYERS[1]], "fold", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.memory.fold()
    run.memory.restore(mark)
    assert same(run, calm)


def test_a_lower_budget_evicts_at_once():
    run = Fed("streaming_llm(tokens=12)").lived()
    run.memory.fold()
    run.memory.set_rules(rules_of("streaming_llm(tokens=8)"))
    assert run.kept(0) == [[[0, 1, 2, 3, 26, 27, 28, 29]] * HEADS]
    assert run.memory.layers[2].rules.select == rules_of("streaming_llm(tokens=8)").select


def test_rules_that_fail_leave_the_old_ones(monkeypatch):
    run = Fed("streaming_llm(tokens=12)").lived()
    before, old = run.kept(0), run.memory.rules
    monkeypatch.setattr(run.memory.layers[LAYERS[1]], "fold", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.memory.set_rules(rules_of("streaming_llm(tokens=8)"))
    assert run.memory.rules is old
    assert run.kept(0) == before


@pytest.mark.parametrize("plan", PLANS)
def test_layers_hold_as_much_as_the_ledger_says(plan):
    run = Fed(plan, rows=2).lived(pads=True)
    ledger = run.ledger()
    held = sum(len(head) for index in LAYERS for row in run.kept(index) for head in row)
    assert ledger.slots == held
    assert ledger.seen == sum(run.memory.seen)
    assert ledger.fed == run.memory.fed
