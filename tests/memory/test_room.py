"""Room for turns to come: appending writes what is new, all copies together stay linear, and nobody is written over."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.encode.dense import Dense
from kvfold.encode.int4 import Int4
from kvfold.encode.int8 import Int8
from kvfold.memory import fold
from kvfold.memory.dense import DensePart
from kvfold.memory.kv import KV
from kvfold.memory.room import UNLIMITED, WrittenEnd, has_room, with_spare
from kvfold.memory.tail import Tail
from kvfold.memory.transcript import Transcript
from memories import SIZE, Fed, slots, step_of
from moved import MovedBytes, moved_by

TEXT = Transcript()
CODECS = {"dense": Dense(), "int8": Int8(group=8), "int4": Int4(group=8), "turned": Int8(group=8, rotate=True)}
COPIED = 17  # times the bytes of a text, by all copies that its growth takes, where room is a sixteenth


def turn(counts, codec, *, first=0):
    """A part of random slots, so many for each row and head."""
    most = max(max(row) for row in counts)
    kv = slots(most, rows=len(counts), heads=len(counts[0]), first=first)
    kept = torch.arange(most) < torch.tensor(counts)[..., None]
    return DensePart.of(kv, codec, kept=kept)


def grown(turns):
    part = turns[0]
    for one in turns[1:]:
        part = part.extend(one, TEXT, UNLIMITED)
    return part


def held(part):
    return {name: tensor.clone() for name, tensor in part.state()[1].items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


EVEN, UNEVEN = ((3, 3), (3, 3)), ((4, 1), (2, 5))


@pytest.mark.parametrize("counts", [EVEN, UNEVEN])
@pytest.mark.parametrize("name", CODECS)
def test_turns_that_are_appended_one_by_one_are_all_there_in_order_of_age(name, counts):
    turns = [turn(counts, CODECS[name], first=10 * at) for at in range(60)]
    part, exact = grown(turns), turns[0]
    for one in turns[1:]:
        exact = exact.extend(one, TEXT)
    assert part.room is not None
    assert exact.room is None
    assert part.counts == exact.counts
    assert same(held(part), held(exact))
    queries = torch.randn(2, 4, 3, SIZE)
    mine, theirs = part.attend(step_of(queries))[0], exact.attend(step_of(queries))[0]
    torch.testing.assert_close(mine.output, theirs.output)
    torch.testing.assert_close(mine.log_sum_exp, theirs.log_sum_exp)
    if part.counts[0][0] == part.counts[-1][-1]:
        assert torch.equal(part.read().keys, exact.read().keys)
    kept = torch.rand(part.slots) < 0.5
    for mine, theirs in ((part.keep(kept), exact.keep(kept)), (part.take_rows([1, 0, 1]), exact.take_rows([1, 0, 1]))):
        assert mine.room is None
        assert same(held(mine), held(theirs))


@pytest.mark.parametrize("counts", [EVEN, UNEVEN])
@pytest.mark.parametrize("name", CODECS)
def test_appending_a_turn_moves_what_the_turn_is_long(name, counts):
    turns = [turn(counts, CODECS[name], first=10 * at) for at in range(400)]
    part, moved = turns[0], []
    for one in turns[1:]:
        last = part
        moved.append(moved_by(lambda last=last, one=one: turns.append(last.extend(one, TEXT, UNLIMITED))))
        part = turns.pop()
    of_turn = sum(tensor.nbytes for _, tensor in turns[0].tensors())
    assert sorted(moved)[len(moved) // 2] == of_turn, "most turns are written into room"
    total = sum(tensor.nbytes for _, tensor in part.without_room().tensors())
    assert sum(moved) <= (COPIED + 1) * total
    # Of a rebuild for each turn 400 turns would move four times what 200 do.
    assert sum(moved) <= 2.5 * sum(moved[:199])


def test_room_is_a_sixteenth_of_each_head_or_of_the_mean_and_never_beyond_a_budget():
    assert with_spare(((160, 160),), UNLIMITED) == ((170, 170),)
    assert with_spare(((160, 0), (160, 160)), UNLIMITED) == ((170, 8), (170, 170))  # of a mean of 120
    assert with_spare(((160, 160),), 3) == ((163, 163),)
    assert with_spare(((160, 160),), -1) == ((160, 160),)
    assert has_room(((3, 1),), ((3, 2),))
    assert not has_room(((3, 3),), ((3, 2),))


def test_bytes_behind_the_slots_are_slack_and_a_snapshot_has_none():
    part = grown([turn(EVEN, Dense(), first=10 * at) for at in range(20)])
    places = sum(sum(row) for row in part.places)
    assert places > part.slots
    for name, tensor in part.tensors():
        assert len(tensor) == places
        assert part.usage().slack[name] == (places - part.slots) * tensor[:1].nbytes
    assert all(len(tensor) == part.slots for tensor in part.state()[1].values())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_forks_steps_back_and_copies_never_see_one_anothers_slots(data):
    """A tree of parts that grow from one another in any order: each holds what its own turns say."""
    codec = Dense()
    first = turn(EVEN, codec)
    parts = [(first, held(first))]
    for at in range(data.draw(st.integers(3, 25))):
        part, before = parts[data.draw(st.integers(0, len(parts) - 1))]
        if data.draw(st.integers(0, 5)) == 0:
            parts.append((copy.deepcopy(part), before))
            continue
        one = turn(data.draw(st.sampled_from([EVEN, UNEVEN])), codec, first=100 * at)
        plain, tensors = part.state()
        exact = DensePart.from_state(plain, tensors, codec).extend(one, TEXT)
        parts.append((part.extend(one, TEXT, data.draw(st.sampled_from([UNLIMITED, UNLIMITED, 0, 12]))), held(exact)))
    assert all(same(held(part), wanted) for part, wanted in parts)


def test_of_many_threads_one_writes_behind_the_slots():
    end, counts = WrittenEnd(((1,),)), ((1,),)
    won, gate = [], threading.Barrier(8)

    def claim(number):
        gate.wait()
        if end.claim(counts, ((2 + number,),)):
            won.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_forks_in_threads_write_into_their_own_room():
    root = grown([turn(EVEN, Dense(), first=10 * at) for at in range(40)])
    turns = [[turn(EVEN, Dense(), first=1000 * number + 10 * at) for at in range(30)] for number in range(6)]
    found = [root] * len(turns)

    def grow(number):
        for one in turns[number]:
            found[number] = found[number].extend(one, TEXT, UNLIMITED)

    threads = [threading.Thread(target=grow, args=(number,)) for number in range(len(turns))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, part in enumerate(found):
        plain, tensors = root.state()
        exact = DensePart.from_state(plain, tensors, Dense())
        for one in turns[number]:
            exact = exact.extend(one, TEXT)
        assert same(held(part), held(exact))


@pytest.mark.parametrize("plan", ["full", "int8", "int4", "snapkv(tokens=99999, window=4)"])
def test_a_long_chat_moves_what_it_is_long(plan, monkeypatch):
    """All that raw tails and folded parts write in forwards and folds."""
    run, after = Fed(plan), []
    with MovedBytes().around(monkeypatch, (Tail, "append"), (Tail, "after"), (fold, "_joined")) as moved:
        for at in range(240):
            run.forward(4, seed=at)
            run.memory.fold()
            after.append(moved.bytes)
    assert after[-1] <= (COPIED + 10) * run.ledger().stored_bytes
    assert after[-1] <= 2.6 * after[119], "twice the turns may not move four times the bytes"


def test_a_budget_in_tokens_bounds_the_room_too():
    run = Fed("h2o(tokens=60, scope='turn')")
    for at in range(20):
        run.forward(3, seed=at)
        run.memory.fold()
    for layer in run.memory.layers.values():
        folded = layer.state.folded
        assert isinstance(folded, DensePart)
        assert max(max(row) for row in folded.places) <= 60 - run.memory.rules.pinned


def test_values_and_keys_of_different_sizes_grow_alike():
    def one(first):
        positions = torch.arange(first, first + 3).expand(1, 2, 3)
        return DensePart.of(KV(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 5), positions), Int8(group=8))

    part = grown([one(3 * at) for at in range(30)])
    assert part.read().values.shape == (1, 2, 90, 5)
    assert part.read().positions[0, 0].tolist() == list(range(90))
