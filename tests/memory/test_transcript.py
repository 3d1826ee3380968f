"""The text of a cache: ids of raw columns, delimiter classes by position, pads nowhere, older values unharmed."""

import pytest
import torch

from kvfold.memory.transcript import APART, SOFT, Transcript, ends

STRONG = 5  # the least level that ends a sentence


def positions(*rows):
    return torch.tensor(rows)


def bytes_of(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


def test_nothing_is_known_of_a_fresh_text():
    text = Transcript()
    assert text.classes_at(0, torch.tensor([0, 5])) == b"\0\0"
    assert text.sentence_ended(torch.tensor([3])) is None
    assert list(text.tensors()) == []


def test_ids_follow_each_other_and_leave_with_their_columns():
    text = Transcript().with_ids(torch.tensor([[7, 8, 9]])).with_ids(torch.tensor([[10]]))
    assert text.ids.tolist() == [[7, 8, 9, 10]]
    assert text.ids.dtype == torch.int32
    assert text.from_column(3).ids.tolist() == [[10]]
    assert text.from_column(1).from_column(3).ids.tolist() == [[10]]
    assert text.from_column(1).from_column(1).ids.tolist() == [[8, 9, 10]]
    assert text.without_ids().ids is None
    assert text.cropped(3, fed=4).ids.tolist() == [[7]]


def test_ids_that_left_keep_no_longer_storage_alive():
    text = Transcript().with_ids(torch.arange(100)[None])
    for short in (text.from_column(97), text.cropped(97, fed=100)):
        assert short.ids.untyped_storage().nbytes() == short.ids.nbytes


def test_a_text_without_ids_stays_without():
    text = Transcript()
    assert text.from_column(2) is text
    assert text.cropped(2, fed=4).ids is None


def test_classes_stand_at_the_positions_of_their_tokens():
    text = Transcript().with_classes(positions([0, 1, 2]), bytes_of([1, 2, 3]), None)
    later = text.with_classes(positions([3]), bytes_of([4]), None)
    assert later.classes_at(0, torch.tensor([3, 0, 2])) == bytes([4, 1, 3])
    assert later.length == 4


def test_pads_are_written_nowhere():
    valid = torch.tensor([[True, True], [True, False]])
    text = Transcript().with_classes(positions([0, 1], [0, 0]), bytes_of([1, 2], [3, 9]), valid)
    assert text.classes_at(1, torch.tensor([0, 1])) == bytes([3, 0])


def test_tokens_of_which_nothing_is_known_clear_what_stood_there():
    text = Transcript().with_classes(positions([0, 1]), bytes_of([1, 2]), None)
    cleared = text.with_classes(positions([1]), None, None)
    assert cleared.classes_at(0, torch.tensor([0, 1])) == bytes([1, 0])


def test_nothing_is_written_where_nothing_is_known_and_nothing_was():
    text = Transcript()
    assert text.with_classes(positions([0, 1]), None, None) is text


def test_an_older_text_reads_less_of_the_same_buffer():
    first = Transcript().with_classes(positions(list(range(40))), bytes_of([2] * 40), None)
    second = first.with_classes(positions([40]), bytes_of([3]), None)
    assert second.classes.data_ptr() == first.classes.data_ptr()
    assert (first.length, second.length) == (40, 41)


def test_positions_beyond_the_text_read_its_last_token():
    text = Transcript().with_classes(positions([0, 1]), bytes_of([1, 2]), None)
    assert text.classes_at(0, torch.tensor([9])) == bytes([2])


def test_rows_are_picked_into_buffers_of_their_own():
    text = Transcript(ids=torch.tensor([[1], [2]], dtype=torch.int32))
    text = text.with_classes(positions([0], [0]), bytes_of([5], [6]), None)
    picked = text.take_rows([1, 1, 0])
    assert picked.ids.flatten().tolist() == [2, 2, 1]
    assert [picked.classes_at(row, torch.tensor([0]))[0] for row in range(3)] == [6, 6, 5]
    assert picked.classes.data_ptr() != text.classes.data_ptr()
    assert dict(picked.tensors()).keys() == {"ids", "classes"}


@pytest.mark.parametrize(
    ("this", "after", "ended"),
    [
        (STRONG, 0, True),
        (STRONG + 2, APART, True),
        (STRONG - 1, APART, False),
        (STRONG | SOFT, 0, False),  # `3.14`: a dot inside
        (STRONG | SOFT, APART, True),  # a dot and then a space
    ],
)
def test_a_sentence_ends_at_a_strong_end_that_stands_apart_where_it_must(this, after, ended):
    assert bool(ends(this, after)) is ended


def test_each_row_says_whether_a_sentence_ended_just_before():
    classes = bytes_of([0, STRONG, APART], [0, 0, 0])
    text = Transcript().with_classes(positions([0, 1, 2], [0, 1, 2]), classes, None)
    assert text.sentence_ended(torch.tensor([2, 2])).tolist() == [True, False]
    assert text.sentence_ended(torch.tensor([1, 1])).tolist() == [False, False]


def test_no_sentence_ends_before_the_first_token():
    text = Transcript().with_classes(positions([0, 1]), bytes_of([STRONG, APART]), None)
    assert text.sentence_ended(torch.tensor([0])).tolist() == [False]


def test_copies_are_written_in_the_other_mode_without_gradients():
    with torch.inference_mode():
        held = Transcript().with_classes(positions([0, 1, 2]), bytes_of([1, 2, 3]), None)
        copies = held.with_fresh_buffers(), held.take_rows([0])
    for copied in copies:
        assert copied.with_classes(positions([1]), bytes_of([7]), None).classes_at(0, torch.arange(3)) == bytes(
            [1, 7, 3]
        )
