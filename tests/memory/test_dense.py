"""Flat parts: any counts per row and head, against the same slots attended one head at a time."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.reference import attend_part
from kvfold.encode.dense import Dense
from kvfold.encode.int8 import Int8
from kvfold.memory.dense import DensePart
from kvfold.memory.kv import KV
from kvfold.memory.step import AttentionStep
from kvfold.memory.transcript import Transcript

SCALE = 0.4


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
    triples = zip(keys.split(sizes), values.split(sizes), part.positions.split(sizes), strict=True)
    return list(triples)


COUNTS = st.integers(1, 3).flatmap(
    lambda heads: st.lists(st.lists(st.integers(0, 5), min_size=heads, max_size=heads), min_size=1, max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.booleans(), st.integers(1, 2), st.integers(1, 3))
def test_attention_over_ragged_counts_is_that_of_each_head_alone(counts, coded, group, new):
    part = part_of(counts, Int8(group=8) if coded else None)
    rows, heads = len(counts), len(counts[0])
    queries = torch.randn(rows, heads * group, new, 8)
    found, after = part.attend(AttentionStep(queries=queries, scale=SCALE))
    assert after is part
    for index, (keys, values, _) in enumerate(pieces(part)):
        row, head = divmod(index, heads)
        some = slice(head * group, (head + 1) * group)
        asked = queries[row : row + 1, some]
        if len(keys) == 0:
            assert (found.log_sum_exp[row, some] == -torch.inf).all()
            continue
        output, weights = attend_part(asked, keys[None, None], values[None, None], scale=SCALE)
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
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for _, tensor in both.tensors())


def test_a_part_made_of_views_keeps_no_longer_storage_alive():
    long = torch.randn(1, 1, 100, 8)
    for count in (0, 3):
        view = long[:, :, :count]
        kv = KV(view, view, torch.arange(100).expand(1, 1, 100)[:, :, :count])
        part = DensePart.of(kv, Dense())
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for _, tensor in part.tensors())
