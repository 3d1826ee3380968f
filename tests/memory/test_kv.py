"""A rectangle of slots: its length is the slots of a head, and heads are sliced with everything they have."""

import torch

from kvfold.memory.kv import positions_of_rows
from memories import SIZE, slots


def test_its_length_is_the_slots_of_a_head():
    assert len(slots(5, rows=3)) == 5
    assert len(slots(0)) == 0


def test_heads_are_sliced_with_values_and_positions():
    kv = slots(4, rows=2, heads=3)
    some = kv.heads(slice(1, 3))
    assert some.keys.shape == some.values.shape == (2, 2, 4, SIZE)
    assert torch.equal(some.values, kv.values[:, 1:])
    assert some.positions.shape == (2, 2, 4)


def test_every_head_has_the_positions_of_its_row():
    rows = torch.tensor([[0, 1], [5, 6]])
    spread = positions_of_rows(rows, 3)
    assert spread.shape == (2, 3, 2)
    assert spread[1].tolist() == [[5, 6]] * 3
    assert spread.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
