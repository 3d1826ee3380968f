"""What the full cache says is computed for the first plan, and is the same for every plan after it."""

import pytest
import torch
from strangers import stranger

from kvfold.bench.ask.read_once import MOST_ENTRIES, ReadOnce
from kvfold.bench.ask.reader import open_rows

CHUNKS = [[[5, 6, 7, 8], [9, 10]], [[11, 12], [13]]]


def asked(reader):
    """What a reader says, in the calls of a comparison."""
    reader.feed([[1, 2, 3], [4]])
    reader.fold()
    said = [reader.answer([[5], [6]], max_new_tokens=3)]
    for chunks in CHUNKS:
        said += reader.read(chunks)
        reader.fold()
    return said


@pytest.mark.parametrize(("most", "begun"), [(MOST_ENTRIES, 1), (20, 3)])
def test_later_plans_are_told_the_same_and_compute_it_only_where_memory_is_short(most, begun):
    opened = []

    def begin():
        opened.append(open_rows(stranger(), "full", count=2))
        return opened[-1]

    once = ReadOnce(begin, most=most)
    first, second, third = (asked(once.reader()) for _ in range(3))
    assert len(opened) == begun
    for other in (second, third):
        assert other[0] == first[0]
        for one, same in zip(first[1:], other[1:], strict=True):
            assert torch.equal(one, same)
