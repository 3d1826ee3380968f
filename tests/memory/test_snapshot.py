"""A snapshot brings everything back bit by bit, and what goes on from it goes on the same."""

import json

import pytest
import torch

from kvfold.errors import CacheError, FileError
from kvfold.memory.forward import Boundaries
from kvfold.memory.snapshot import Snapshot, put_back, take
from memories import LAYERS, Fed

PLANS = [
    "full",
    "none",
    "int8",
    "int4",
    "streaming_llm(keep=0.5)",
    "h2o(keep=0.4) + int8",
    "h2o(tokens=12, scope='turn')",
    "snapkv(keep=0.5, window=4) + int4",
]


def twin_of(run, plan):
    """Another memory of the same plan, made from a run's snapshot."""
    other = Fed(plan, rows=run.rows)
    put_back(other.memory, through_json(take(run.memory)))
    other.mask = run.mask
    return other


def lived(plan, *, rows=1, stride=None, **more):
    """A run that was fed and folded twice and then fed again."""
    return Fed(plan, rows=rows, stride=stride).lived(**more)


def through_json(snapshot):
    """The snapshot with fresh tensors and with its plain part as a file would hold it."""
    tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    return Snapshot(tensors=tensors, plain=json.loads(json.dumps(snapshot.plain)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_put_back_and_go_on_equals_going_on(plan, rows, dtype):
    run = lived(plan, rows=rows, dtype=dtype, pads=rows > 1)
    twin = twin_of(run, plan)
    for step in range(3):
        ours = run.forward(5, seed=20 + step, dtype=dtype)
        theirs = twin.forward(5, seed=20 + step, dtype=dtype)
        assert torch.equal(ours, theirs)
        run.memory.fold()
        twin.memory.fold()
    assert same(take(run.memory), take(twin.memory))


def same(one, other):
    return (
        one.plain == other.plain
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    )


@pytest.mark.parametrize("plan", PLANS)
def test_a_snapshot_of_what_was_put_back_is_the_same_snapshot(plan):
    run = lived(plan, rows=2, pads=True)
    assert same(take(twin_of(run, plan).memory), take(run.memory))


def test_only_the_slack_of_raw_tails_is_left_out():
    plan = "snapkv(keep=0.5, window=4)"
    run = lived(plan)
    run.forward(20, seed=1)
    before, after = run.ledger(), twin_of(run, plan).ledger()
    assert before.slack_bytes > 0
    assert after.slack_bytes == 0
    assert after.stored_bytes == before.stored_bytes - before.slack_bytes
    assert (after.fed, after.seen, after.slots) == (before.fed, before.seen, before.slots)


def test_taking_a_snapshot_changes_nothing():
    run, untouched = lived("h2o(keep=0.4)"), lived("h2o(keep=0.4)")
    ledger = run.ledger()
    take(run.memory)
    assert run.ledger() == ledger
    assert torch.equal(run.forward(4, seed=3), untouched.forward(4, seed=3))


def test_a_forward_that_never_ended_is_not_in_the_snapshot():
    run = lived("h2o(keep=0.4)")
    whole = take(run.memory)
    run.forward(2, seed=4, layers=LAYERS[:1])
    assert same(take(run.memory), whole)


def test_boundaries_come_along_and_an_interrupted_fold_is_ended_first(monkeypatch):
    plan = "streaming_llm(keep=0.5)"
    run, calm = lived(plan, stride=10), lived(plan, stride=10)
    with monkeypatch.context() as patched:
        patched.setattr(run.memory.layers[LAYERS[1]], "fold", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.memory.fold()
    calm.memory.fold()
    twin = twin_of(run, plan)
    assert twin.memory.mark().boundaries == Boundaries(prompt=0, stride=10)
    assert torch.equal(twin.forward(25, seed=5), calm.forward(25, seed=5))
    assert same(take(twin.memory), take(calm.memory))
    assert [layer.state.tail.length for layer in twin.memory.layers.values()] == [5, 5]


def interrupt(transcript, columns=None):
    raise KeyboardInterrupt


def test_an_empty_memory_has_a_snapshot():
    twin = twin_of(Fed("full"), "full")
    assert twin.memory.fed == 0
    assert torch.equal(twin.forward(4, seed=1), Fed("full").forward(4, seed=1))


def test_another_set_of_layers_is_refused():
    other = Fed("full", layers=(0,)).memory
    with pytest.raises(CacheError, match=r"layers \[0, 2\] was to be put into a model that folds \[0\]"):
        put_back(other, take(lived("full").memory))


@pytest.mark.parametrize("spoil", ["drop", "shorten_folded", "shorten_tail"])
def test_a_snapshot_that_contradicts_itself_is_refused_and_the_memory_left_alone(spoil):
    taken = through_json(take(lived("h2o(keep=0.4) + int8").memory))
    tensors = dict(taken.tensors)
    if spoil == "drop":
        del tensors["2.folded.positions"]
    elif spoil == "shorten_folded":
        tensors["2.folded.key_codes"] = tensors["2.folded.key_codes"][1:]
    else:
        tensors["0.tail.keys"] = tensors["0.tail.keys"][:, :, 1:]
    twin = Fed("h2o(keep=0.4) + int8").memory
    with pytest.raises(FileError, match="contradicts itself"):
        put_back(twin, Snapshot(tensors=tensors, plain=taken.plain))
    assert twin.fed == 0
    assert all(layer.state.tail is None for layer in twin.layers.values())
