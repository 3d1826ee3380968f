"""Stores in a tier: written behind what is there, older readers unharmed, copies only where two histories part."""

import copy

import pytest
import torch

from kvfold.errors import FileError
from kvfold.memory.store import TensorBuffer, TierStore
from kvfold.place.tiers.device import DeviceTier
from kvfold.place.tiers.disk import DiskTier
from kvfold.place.tiers.host import HostTier

CPU = torch.device("cpu")


def store_in(tier):
    return TierStore(tier, CPU)


def payload(*numbers):
    """Slots of two numbers each, head after head."""
    flat = torch.tensor(numbers, dtype=torch.float32)
    return {"keys": torch.stack([flat, -flat], dim=1), "positions": flat.to(torch.int32)}


def held(store, counts):
    """Numbers of every head."""
    flat = store.flat(counts)
    assert torch.equal(flat["keys"][:, 1], -flat["keys"][:, 0])
    return [piece.tolist() for piece in flat["positions"].split(list(counts))]


@pytest.fixture(params=["device", "host", "disk"])
def tier(request, tmp_path):
    if request.param == "disk":
        return DiskTier.open(directory=str(tmp_path), limit_bytes=None)
    return {"device": DeviceTier, "host": HostTier}[request.param]()


def test_slots_are_written_head_after_head_and_read_again(tier):
    store = store_in(tier).append((0, 0), payload(1, 2, 3), [1, 2])
    assert held(store, (1, 2)) == [[1], [2, 3]]
    assert store.filled == (1, 2)


def test_what_fits_is_written_behind_what_is_there_in_the_same_store(tier):
    first = store_in(tier).append((0, 0), payload(*range(20)), [10, 10])
    grown = first.append((10, 10), payload(20, 21), [1, 1])
    again = grown.append((11, 11), payload(30), [1, 0])
    assert grown is not first  # there was no room behind ten slots
    assert again is grown
    assert held(again, (12, 11)) == [[*range(10), 20, 30], [*range(10, 20), 21]]


def test_a_store_grows_by_an_eighth_and_the_first_one_fits_exactly(tier):
    first = store_in(tier).append((0,), payload(*range(80)), [80])
    assert first.capacity == 80
    assert first.append((80,), payload(1), [1]).capacity == 81 + 10


def test_an_older_reader_still_reads_its_slots(tier):
    first = store_in(tier).append((0, 0), payload(*range(20)), [10, 10])
    later = first.append((10, 10), payload(20, 21), [1, 1])
    later.append((11, 11), payload(30), [1, 0])
    assert held(later, (10, 10)) == held(first, (10, 10)) == [list(range(10)), list(range(10, 20))]


def test_two_histories_that_part_do_not_write_over_each_other(tier):
    base = store_in(tier).append((0,), payload(*range(9)), [9]).append((9,), payload(9), [1])
    one = base.append((10,), payload(10), [1])
    other = base.append((10,), payload(99), [1])
    assert one is base
    assert other is not base
    assert held(one, (11,)) == [[*range(10), 10]]
    assert held(other, (11,)) == [[*range(10), 99]]


def test_histories_with_the_same_slots_have_one_lineage_and_those_that_part_two(tier):
    base = store_in(tier).append((0,), payload(1, 2), [2])
    grown = base.append((2,), payload(3), [1])
    parted = base.append((1,), payload(9), [1])
    assert grown.lineage is base.lineage
    assert parted.lineage is not base.lineage


def test_any_slots_are_gathered_in_any_order(tier):
    store = store_in(tier).append((0, 0), payload(1, 2, 3, 4), [2, 2])
    where = torch.tensor([1, 0]) * store.capacity + torch.tensor([1, 0])  # head 1 slot 1, head 0 slot 0
    found = store.gather(where, ["positions"])
    assert found["positions"].tolist() == [4, 1]
    assert found.keys() == {"positions"}


def test_a_window_is_the_same_slots_of_every_head(tier):
    store = store_in(tier).append((0, 0), payload(1, 2, 3, 4, 5, 6), [3, 3])
    assert store.window(1, 3, ["positions"])["positions"].tolist() == [[2, 3], [5, 6]]


def test_heads_without_slots_are_stored_too(tier):
    store = store_in(tier).append((0, 0), payload(1), [0, 1])
    assert held(store, (0, 1)) == [[], [1]]


def test_a_copy_is_written_by_itself(tier):
    store = store_in(tier).append((0,), payload(*range(9)), [9]).append((9,), payload(9), [1])
    twin = copy.deepcopy(store)
    twin.append((10,), payload(50), [1])
    store.append((10,), payload(60), [1])
    assert held(twin, (11,))[0][-1] == 50
    assert held(store, (11,))[0][-1] == 60
    assert twin.tier is store.tier


def test_a_long_store_is_moved_piece_by_piece(monkeypatch):
    monkeypatch.setattr("kvfold.memory.store._COPIED_SLOTS", 4)
    store = store_in(HostTier()).append((0, 0), payload(*range(20)), [11, 9])
    assert held(store.append((11, 9), payload(50), [0, 1]), (11, 10)) == [[*range(11)], [*range(11, 20), 50]]


def test_a_tensor_is_named_after_its_buffer():
    store = store_in(DeviceTier()).append((0,), payload(1), [1])
    assert dict(store.tensors()).keys() == {"keys", "positions"}


def test_a_buffer_of_several_tensors_numbers_them():
    class Halves(TensorBuffer):
        def tensors(self):
            yield from self.tensor.chunk(2, dim=1)

    class HalvesTier(DeviceTier):
        def buffer(self, shape, dtype, device):
            return Halves(torch.zeros(*shape, dtype=dtype))

    store = store_in(HalvesTier()).append((0,), payload(1, 2), [2])
    assert [name for name, _ in store.tensors()] == ["keys_0", "keys_1", "positions_0", "positions_1"]


@pytest.mark.parametrize("second", [[4], [1]])
def test_the_first_of_two_copies_that_grow_from_a_store_carries_its_lineage_on(tier, second):
    base = store_in(tier).append((0,), payload(*range(9)), [9]).append((9,), payload(9), [1])
    twin = copy.deepcopy(base)
    one = base.append((10,), payload(10, 11, 12, 13), [4])
    other = base.append((10,), payload(*range(90, 90 + second[0])), second)
    assert one.lineage is base.lineage
    assert other is not base, "it would be read by the lineage of the first"
    assert other.lineage is not base.lineage
    assert held(base, (10,)) == held(other, (10,)) == held(one, (10,)) == [[*range(10)]]
    assert twin.append((10,), payload(10, 11, 12, 13), [4]).lineage is twin.lineage


def test_a_copy_that_fails_leaves_the_store_the_newest(monkeypatch):
    base = store_in(HostTier()).append((0,), payload(*range(9)), [9]).append((9,), payload(9), [1])

    def full(*given):
        raise FileError("there is no room")

    with monkeypatch.context() as patch:
        patch.setattr(HostTier, "buffer", full)
        with pytest.raises(FileError):
            base.append((10,), payload(10, 11, 12, 13), [4])
    assert base.append((10,), payload(10), [1]) is base
