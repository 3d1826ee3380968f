"""The raw tail: one token copied per token, buffers that grow by an eighth, older tails that stay as they were."""

import pytest
import torch

from kvfold.memory.tail import PAD, Tail


def grown(columns, *, rows=2):
    tail = Tail.empty(torch.empty(rows, 2, 0, 4), torch.empty(rows, 2, 0, 3))
    return added(tail, columns) if columns else tail


def added(tail, columns, valid=None):
    rows = tail.keys.shape[0]
    positions = torch.arange(tail.length, tail.length + columns).expand(rows, columns)
    keys, values = torch.randn(rows, 2, columns, 4), torch.randn(rows, 2, columns, 3)
    return tail.append(keys, values, positions=positions, valid=valid)


def test_an_empty_tail_has_the_shape_and_type_of_its_keys():
    tail = Tail.empty(torch.empty(3, 2, 0, 4, dtype=torch.bfloat16), torch.empty(3, 2, 0, 5))
    assert (tail.length, tail.start, tail.padded) == (0, 0, False)
    assert tail.keys.shape == (3, 2, 0, 4)
    assert tail.values.shape == (3, 2, 0, 5)
    assert tail.keys.dtype == torch.bfloat16
    assert tail.slack_bytes == 0
    assert tail.valid.shape == (3, 0)


def test_buffers_grow_by_an_eighth_and_only_when_they_must():
    tail = grown(80)
    assert tail.keys.shape[2] == 90
    later = added(tail, 10)
    assert later.keys.data_ptr() == tail.keys.data_ptr()
    assert added(later, 1).keys.shape[2] == 91 + 11


def test_an_older_tail_is_as_it_was_while_newer_tokens_are_written_behind_it():
    tail = grown(80)
    before = tail.keys[:, :, :80].clone()
    first = added(tail, 3)
    second = added(tail, 3)
    assert torch.equal(tail.keys[:, :, :80], before)
    assert first.length == second.length == 83
    assert first.keys.data_ptr() == second.keys.data_ptr()


def test_what_is_left_fits_exactly():
    left = added(grown(80), 5).after(82)
    assert (left.length, left.start) == (3, 82)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for _, tensor in left.tensors())
    assert left.slack_bytes == 0
    assert grown(80).after(80).slack_bytes == 0


def test_what_is_left_of_what_was_left_counts_from_the_first_column():
    assert grown(10).after(4).after(3).start == 7


def test_slack_is_what_lies_behind_the_last_column():
    assert grown(80).slack_bytes == 10 * 2 * (2 * 4 * 4 + 2 * 3 * 4 + 4)


def test_pads_are_columns_without_a_position():
    valid = torch.tensor([[True, False, True], [True, True, True]])
    tail = added(grown(2), 3, valid)
    assert tail.padded
    assert tail.valid.tolist() == [[True, True, True, False, True], [True] * 5]
    assert (tail.positions == PAD).sum() == 1 + 2 * (tail.keys.shape[2] - 5)


def test_columns_can_become_pads_later_and_the_older_tail_does_not_notice():
    tail = grown(5)
    gone = torch.zeros(2, 5, dtype=torch.bool)
    gone[1, 4] = True
    fewer = tail.without(gone)
    assert fewer.padded
    assert fewer.valid[1].tolist() == [True] * 4 + [False]
    assert tail.valid.all()


def test_a_tail_whose_pads_have_left_is_no_longer_padded():
    gone = torch.zeros(2, 5, dtype=torch.bool)
    gone[1, 1] = True
    tail = grown(5).without(gone)
    assert tail.after(1).padded
    assert not tail.after(2).padded
    assert not tail.take_rows([0]).after(0).padded


def test_rows_and_crops_are_values():
    tail = grown(6)
    swapped = tail.take_rows([1, 0, 1])
    assert torch.equal(swapped.keys[0], tail.keys[1])
    assert torch.equal(swapped.positions[1], tail.positions[0])
    assert swapped.cropped(4).length == 4
    assert swapped.length == tail.length == 6


def test_a_crop_keeps_the_buffers_and_the_next_token_is_written_over_what_was_cropped():
    tail = grown(6)
    again = added(tail.cropped(4), 1)
    assert again.keys.data_ptr() == tail.keys.data_ptr()
    assert again.length == 5


def test_buffers_made_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        tail = grown(4)
    assert not tail.keys.is_inference()
    assert added(tail, 60).length == 64


def test_room_ahead_says_where_tokens_will_stand_and_holds_numbers():
    tail = added(grown(10).after(4), 2).ahead(9)
    assert (tail.length, tail.start) == (8, 4)
    assert tail.keys.shape[2] == 17 + 2
    assert tail.positions[0, 8:17].tolist() == list(range(12, 21))
    assert not tail.keys[:, :, 8:17].any()
    assert tail.valid.shape == (2, 8)
    assert tail.ahead(11).keys is tail.keys  # there is room already


def test_a_token_that_was_written_into_the_room_is_read_and_another_may_be_appended_over_it():
    tail = grown(8).ahead(4)
    tail.keys[:, :, 8] = 1.0
    longer = tail.written()
    assert (longer.length, longer.keys is tail.keys) == (9, True)
    assert longer.valid.all()
    assert added(tail, 1).keys is tail.keys
    with pytest.raises(AssertionError, match="into room that is there"):
        grown(8).after(0).written()
