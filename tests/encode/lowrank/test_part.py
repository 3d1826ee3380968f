"""Low-rank parts: what is kept, moved and counted, against the same slots read back."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.reference import attend_part
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.memory.kv import KV
from kvfold.memory.room import UNLIMITED
from kvfold.memory.step import AttentionStep
from kvfold.memory.transcript import Transcript
from moved import moved_by
from ranks import form

HEADS, SIZE, SCALE = 2, 8, 0.3
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=3)


def part_of(count, own, *, rows=1, first=0, dtype=torch.float32):
    """A part of random slots in random levels."""
    shape = (rows, HEADS, count, SIZE)
    positions = torch.arange(first, first + count).expand(rows, HEADS, -1)
    kv = KV(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), positions)

    def deal(keys, values, positions):
        return torch.randint(0, len(own.levels), (len(positions),))

    kept = torch.ones(rows, HEADS, count, dtype=torch.bool)
    return LowRankPart.of(kv, kept, deal, own)


WAYS = [{}, {"parts": HEADS}, {"int8": True}, {"parts": HEADS, "int8": True}]  # in which latents lie


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 3), st.data())
def test_keep_extend_and_rows_move_slots_and_lose_none(way, count, more, rows, data):
    own = form(HEADS, SIZE, **way)
    part = part_of(count, own, rows=rows)
    other = part_of(more, own, rows=rows, first=count)
    some = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    order = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
    both = part.keep(some.repeat(rows * HEADS)).extend(other, Transcript()).take_rows(order)
    old, new, found = part.read(), other.read(), both.read()
    for place, row in enumerate(order):
        for name in ("keys", "values", "positions"):
            first, second = getattr(old, name)[row][:, some], getattr(new, name)[row]
            wanted = torch.cat([first, second], dim=1).double()
            assert torch.allclose(getattr(found, name)[place].double(), wanted, rtol=1e-4, atol=1e-4)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for _, tensor in both.tensors())


def test_bytes_are_the_kept_dimensions_and_a_position_a_token():
    own = form(HEADS, SIZE)
    part = part_of(40, own, dtype=torch.bfloat16)
    held = part.held[0].tolist()
    numbers = sum(count * sum(level) for count, level in zip(held, own.levels, strict=True))
    size = {name: tensor.untyped_storage().nbytes() for name, tensor in part.tensors()}
    assert sum(held) == 40
    assert size == {"held": 4 * len(own.levels), "keys": size["keys"], "values": size["values"], "positions": 160}
    assert size["keys"] + size["values"] == 2 * numbers
    assert part.slots == 80


def test_latents_as_bytes_are_a_byte_a_number_and_two_scales_a_token_and_off_by_half_a_scale_at_most():
    own, count = form(HEADS, SIZE, int8=True), 40
    torch.manual_seed(1)
    part = part_of(count, own)
    torch.manual_seed(1)
    plain = part_of(count, replace(own, int8=False))
    size = {name: tensor.untyped_storage().nbytes() for name, tensor in part.tensors()}
    assert size["scales"] == 2 * 2 * count
    assert size["keys"] == dict(plain.tensors())["keys"].numel()
    for rough, exact in zip(part.blocks[0], plain.blocks[0], strict=True):
        off = (rough.value_numbers() - exact.value_numbers()).abs()
        assert (off <= 0.51 * rough.scales[:, 1:].float()).all()


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_batch_attend_over_their_own_slots(way):
    own = form(HEADS, SIZE, **way)
    whole = part_of(9, own, rows=3)
    kept = torch.ones(3, HEADS, 9, dtype=torch.bool)
    kept[1], kept[2, :, 4:] = False, False
    part = whole.keep(kept.flatten())
    assert part.counts == ((9, 9), (0, 0), (4, 4))
    queries = torch.randn(3, 4, 2, SIZE)
    found, after = part.attend(AttentionStep(queries=queries, scale=SCALE))
    assert after is part
    for row in (0, 2):
        kv = part.take_rows([row]).read()
        output, weights = attend_part(queries[row : row + 1], kv.keys, kv.values, scale=SCALE)
        assert torch.allclose(found.output[row], output[0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.log_sum_exp[row], weights[0], rtol=1e-4, atol=1e-4)
    assert (found.log_sum_exp[1] == -torch.inf).all()


def test_the_shares_of_kept_numbers_are_those_of_the_levels_oldest_first():
    own = form(HEADS, SIZE)
    part = part_of(12, own, rows=2)
    for row, shares in enumerate(part.usage().shares):
        by_position = sorted(
            (position, sum(level) / own.size)
            for block, level in zip(part.blocks[row], own.levels, strict=True)
            for position in block.positions.tolist()
        )
        assert torch.allclose(shares, torch.tensor([share for _, share in by_position]))
    assert part.usage().attended_slots == part.slots == 2 * 2 * 12


@pytest.mark.parametrize("way", WAYS)
def test_turns_that_are_appended_one_by_one_are_all_there_and_most_move_nothing_else(way):
    own = form(HEADS, SIZE, **way)
    turns = [part_of(3, own, rows=2, first=3 * at) for at in range(150)]
    part, exact, moved = turns[0], turns[0], []
    for one in turns[1:]:
        last = part
        moved.append(moved_by(lambda last=last, one=one: turns.append(last.extend(one, Transcript(), UNLIMITED))))
        part, exact = turns.pop(), exact.extend(one, Transcript())
    assert part.room is not None
    assert exact.room is None
    mine, theirs = part.state()[1], exact.state()[1]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    queries = torch.randn(2, 4, 2, SIZE)
    step = AttentionStep(queries=queries, scale=SCALE)
    torch.testing.assert_close(part.attend(step)[0].output, exact.attend(step)[0].output)
    rows, wanted = part.take_rows([1, 0]).state()[1], exact.take_rows([1, 0]).state()[1]
    assert all(torch.equal(rows[name], wanted[name]) for name in rows)
    used = sum(tensor.nbytes for tensor in mine.values())
    slack = part.usage().slack
    assert sum(tensor.nbytes for _, tensor in part.tensors()) - sum(slack.values()) == used + part.room.nbytes
    assert sorted(moved)[len(moved) // 2] < 10 * used / 150, "most turns are written into room"
    # A level that fills up moves all eight: more copies than of one block, and yet as many bytes as the text is long.
    assert sum(moved) < 40 * used


def test_a_part_that_was_left_behind_goes_on_in_a_copy():
    own = form(HEADS, SIZE)
    turns = [part_of(3, own, first=3 * at) for at in range(40)]
    root = turns[0]
    for one in turns[1:30]:
        root = root.extend(one, Transcript(), UNLIMITED)
    before = root.read().keys.clone()
    first, second = (root.extend(one, Transcript(), UNLIMITED) for one in turns[30:32])
    assert torch.equal(root.read().keys, before)
    for part, one in ((first, turns[30]), (second, turns[31])):
        torch.testing.assert_close(part.read().keys, torch.cat([before, one.read().keys], dim=2))


@pytest.mark.parametrize("way", WAYS)
def test_a_part_that_contradicts_its_tensors_is_refused(way):
    own = form(HEADS, SIZE, **way)
    part = part_of(9, own)
    plain, tensors = part.state()
    again = LowRankPart.from_state(plain, tensors, own)
    assert torch.equal(again.read().keys, part.read().keys)
    with pytest.raises(ValueError, match="keys are promised"):
        LowRankPart.from_state(plain, tensors | {"keys": tensors["keys"][1:]}, own)
    if own.int8:
        with pytest.raises(ValueError, match="scales are promised"):
            LowRankPart.from_state(plain, tensors | {"scales": tensors["scales"][1:]}, own)
    with pytest.raises(ValueError, match="parts are there"):
        LowRankPart.from_state({**plain, "parts": [7, 1]}, tensors, own)
    with pytest.raises(ValueError, match="are there, and the plan's are"):
        LowRankPart.from_state(plain, tensors, replace(own, int8=not own.int8))
    with pytest.raises(ValueError, match="dimensions are there"):
        LowRankPart.from_state({**plain, "levels": [[1, 1]]}, tensors, own)
