"""What every layout has without writing it: it is shared by forks, lies on the device, and refuses single fetches."""

import pytest
import torch

from kvfold.encode.dense import Dense
from kvfold.errors import CacheError
from kvfold.memory.dense import DensePart
from kvfold.memory.part import Part, slots_of_rows
from kvfold.place.tiers.host import HostTier
from memories import slots


def part_of(kept):
    return DensePart.of(slots(len(kept[0][0]), rows=len(kept)), Dense(), kept=torch.tensor(kept))


RAGGED = [[[True, True], [True, False]], [[False, False], [True, False]]]


def test_slots_are_counted_over_rows_and_heads():
    part = part_of(RAGGED)
    assert part.slots == 4
    assert slots_of_rows(part) == [2, 1]


def test_a_part_that_never_changes_is_shared_by_a_fork():
    part = part_of(RAGGED)
    assert part.fork() is part


def test_a_part_reads_all_it_holds_and_lies_on_the_device():
    usage = part_of(RAGGED).usage()
    assert usage.attended_slots == 4
    assert usage.tiers == {}
    assert usage.fetched is None


def test_a_layout_whose_slots_cannot_be_fetched_singly_says_what_to_do():
    class Whole(DensePart):
        pages = Part.pages

    whole = Whole(
        **{name: getattr(part_of(RAGGED), name) for name in ("codec", "dtype", "counts", "payload", "positions")}
    )
    with pytest.raises(CacheError, match=r"a Whole was to lie in host memory; .*leave the place member away"):
        whole.pages(HostTier())
