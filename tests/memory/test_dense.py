"""Flat parts: any counts per row and head, against the same slots attended one head at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.reference import attend_part
from kvfold.encode.dense import Dense
from kvfold.encode.int8 import Int8
from kvfold.memory.dense import DensePart
from kvfold.memory.kv import KV
from kvfold.memory.transcript import Transcript
from memories import SCALE, slots, step_of


def part_of(counts, codec=None):
    """A part of random slots with these counts."""
    total = sum(sum(row) for row in counts)
    positions = torch.cat([torch.arange(count) for row in counts for count in row]).int()
    codec = codec or Dense()
    return DensePart(
        codec=codec,
        dtype=torch.float32,
        counts=tuple(tuple(row) for row in counts),
        payload=codec.encode(torch.randn(total, 8), torch.randn(total, 8)),
        positions=positions,
    )


def pieces(part):
    """Keys, values and positions of every row and head, decoded."""
    keys, values = part.codec.decode(part.payload, torch.float32)
    sizes = [count for row in part.counts for count in row]
    return list(zip(keys.split(sizes), values.split(sizes), part.positions.split(sizes), strict=True))


def fits_exactly(part):
    return all(tensor.untyped_storage().nbytes() == tensor.nbytes for _, tensor in part.tensors())


COUNTS = st.integers(1, 3).flatmap(
    lambda heads: st.lists(st.lists(st.integers(0, 5), min_size=heads, max_size=heads), min_size=1, max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.booleans(), st.integers(1, 2), st.integers(1, 3))
def test_attention_over_ragged_counts_is_that_of_each_head_alone(counts, coded, group, new):
    part = part_of(counts, Int8(group=8) if coded else None)
    rows, heads = len(counts), len(counts[0])
    queries = torch.randn(rows, heads * group, new, 8)
    found, after = part.attend(step_of(queries))
    assert after is part
    for index, (keys, values, _) in enumerate(pieces(part)):
        row, head = divmod(index, heads)
        some = slice(head * group, (head + 1) * group)
        of_group = queries[row : row + 1, some]
        if len(keys) == 0:
            assert (found.log_sum_exp[row, some] == -torch.inf).all()
            continue
        output, weights = attend_part(of_group, keys[None, None], values[None, None], scale=SCALE)
        assert torch.allclose(found.output[row, some], output[0], rtol=1e-4, atol=1e-5)
        assert torch.allclose(found.log_sum_exp[row, some], weights[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.data())
def test_keep_extend_and_rows_move_slots_and_lose_none(counts, data):
    part, other = part_of(counts), part_of(counts)
    total = part.positions.shape[0]
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), dtype=torch.bool)
    order = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=4))
    both = part.keep(kept).extend(other, Transcript()).take_rows(order)
    heads = len(counts[0])
    mine, theirs, found = pieces(part), pieces(other), pieces(both)
    picks = kept.split([count for row in counts for count in row])
    for place, row in enumerate(order):
        for head in range(heads):
            index = row * heads + head
            for which in range(3):
                wanted = torch.cat([mine[index][which][picks[index]], theirs[index][which]])
                assert torch.equal(found[place * heads + head][which], wanted)
    assert fits_exactly(both)


def test_only_the_slots_of_the_mask_are_written():
    kv = slots(4)
    kept = torch.tensor([[[True, False, True, False], [False, False, False, True]]])
    part = DensePart.of(kv, Dense(), kept=kept)
    assert part.counts == ((2, 1),)
    assert part.slots == 3
    assert torch.equal(part.payload["keys"], torch.cat([kv.keys[0, 0, [0, 2]], kv.keys[0, 1, [3]]]))
    assert part.positions.tolist() == [0, 2, 3]


def test_a_part_made_of_views_keeps_no_longer_storage_alive():
    long = torch.randn(1, 1, 100, 8)
    for count in (0, 3):
        view = long[:, :, :count]
        kv = KV(view, view, torch.arange(100).expand(1, 1, 100)[:, :, :count])
        assert fits_exactly(DensePart.of(kv, Dense()))


def test_slots_are_read_as_a_rectangle_and_heads_by_themselves():
    kv = slots(3, rows=2)
    part = DensePart.of(kv, Dense())
    whole, second = part.read(), part.read(slice(1, 2))
    assert torch.equal(whole.keys, kv.keys)
    assert torch.equal(whole.positions, kv.positions)
    assert torch.equal(second.values, kv.values[:, 1:])


def test_one_head_of_ragged_rows_is_read_where_these_hold_as_many():
    part = part_of([[2, 3], [2, 1]])
    first = part.read(slice(0, 1))
    mine = pieces(part)
    assert torch.equal(first.keys, torch.stack([mine[0][0], mine[2][0]])[:, None])


@pytest.mark.parametrize(
    ("counts", "blocks"), [([[2, 2], [2, 2]], 1), ([[2, 2], [3, 3]], 2), ([[2, 1], [3, 3]], 3), ([[0, 0]], 1)]
)
def test_attention_takes_as_few_calls_as_rectangles_cover_the_counts(counts, blocks):
    assert len(part_of(counts).blocks) == blocks


def test_keys_and_values_that_lie_as_they_came_are_seen_without_a_copy():
    part = DensePart.of(slots(3), Dense())
    assert part.rectangles is not None
    ((keys, _),) = part.rectangles
    assert keys.untyped_storage().data_ptr() == part.payload["keys"].untyped_storage().data_ptr()


def test_ragged_slots_have_a_view_for_each_block_and_rounded_ones_have_none():
    assert [tuple(keys.shape[:3]) for keys, _ in part_of([[2, 1]]).rectangles] == [(1, 1, 2), (1, 1, 1)]
    assert part_of([[2, 2]], Int8(group=8)).rectangles is None


def test_a_rounded_part_is_decoded_piece_by_piece_and_answers_the_same(monkeypatch):
    part = part_of([[9, 9]], Int8(group=8))
    queries = torch.randn(1, 4, 2, 8)
    whole, _ = part.attend(step_of(queries))
    monkeypatch.setattr("kvfold.memory.dense._DECODED_SLOTS", 4)
    pieces_of_it, _ = part.attend(step_of(queries))
    assert torch.allclose(whole.output, pieces_of_it.output, rtol=1e-5, atol=1e-6)
    assert torch.allclose(whole.log_sum_exp, pieces_of_it.log_sum_exp, rtol=1e-5, atol=1e-6)


def test_a_saved_part_comes_back():
    part = part_of([[2, 1], [0, 3]], Int8(group=8))
    plain, tensors = part.state()
    again = DensePart.from_state(plain, tensors, part.codec)
    assert (again.counts, again.dtype) == (part.counts, part.dtype)
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(again.tensors(), part.tensors(), strict=True))


def test_saved_tensors_that_do_not_fit_their_counts_are_refused():
    plain, tensors = part_of([[2, 1]]).state()
    with pytest.raises(ValueError, match="3 slots are promised, and keys holds 2"):
        DensePart.from_state(plain, tensors | {"keys": tensors["keys"][1:]}, Dense())
