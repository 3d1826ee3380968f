"""Pages in a tier are read as their layout reads them: dense, rounded or of few dimensions."""

import pytest
import torch

import ranks
from kvfold.encode.dense import Dense
from kvfold.encode.int4 import Int4
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.memory.dense import DensePart
from kvfold.memory.transcript import Transcript
from kvfold.place.tiers.disk import DiskTier
from kvfold.place.tiers.host import HostTier
from memories import HEADS, SIZE, slots

ROWS, FIRST, SECOND = 2, 60, 31


def dense(kv):
    return DensePart.of(kv, Dense())


def rounded(kv):
    return Int4().pack(kv, torch.ones(kv.positions.shape, dtype=torch.bool))


def low_rank(kv, **way):
    torch.manual_seed(5)
    form = ranks.form(HEADS, SIZE, **way)
    every = torch.ones(kv.positions.shape, dtype=torch.bool)
    return LowRankPart.of(kv, every, lambda keys, values, positions: positions.long() * 5 % 8, form)


def low_rank_as_bytes(kv):
    return low_rank(kv, parts=HEADS, int8=True)


@pytest.fixture(params=[dense, rounded, low_rank, low_rank_as_bytes])
def make(request):
    return request.param


@pytest.fixture(params=["host", "disk"])
def tier(request, tmp_path):
    return HostTier() if request.param == "host" else DiskTier.open(directory=str(tmp_path), limit_bytes=None)


def none_of(part):
    return tuple((0,) * len(row) for row in part.counts)


@pytest.fixture
def stored(make, tier):
    """Pages of two parts, and the two as one part."""
    first, second = make(slots(FIRST, rows=ROWS)), make(slots(SECOND, rows=ROWS, first=FIRST))
    pages = first.pages(tier).append(none_of(first), first).append(first.counts, second)
    return pages, first.extend(second, Transcript())


def test_all_slots_come_back_as_the_part_that_they_would_be(stored):
    pages, both = stored
    whole = pages.whole(both.counts)
    assert whole.counts == both.counts
    for (name, one), (other_name, other) in zip(whole.tensors(), both.tensors(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name


def test_any_slots_of_any_heads_are_fetched(stored):
    pages, both = stored
    heads = torch.tensor([3, 0, 2, 1, 3])
    some = torch.tensor([90, 0, 59, 60, 7])
    keys, values, moved = pages.fetch(heads, some)
    kv = both.read()
    assert torch.allclose(keys, kv.keys.flatten(0, 1)[heads, some], atol=1e-5)
    assert torch.allclose(values, kv.values.flatten(0, 1)[heads, some], atol=1e-5)
    assert moved > 0


def test_bytes_that_move_are_those_that_are_stored(make, tier):
    part = make(slots(FIRST, rows=ROWS))
    pages = part.pages(tier).append(none_of(part), part)
    every = torch.arange(FIRST)
    _, _, moved = pages.fetch(torch.zeros_like(every), every)
    if make in (dense, rounded):
        of_slots = sum(tensor.nbytes for tensor in part.payload.values())
        assert moved == of_slots // (ROWS * HEADS)
    else:
        latents = [part.keys, part.values] + ([] if part.scales is None else [part.scales])
        assert moved < sum(tensor.nbytes for tensor in latents)  # of one row


def test_a_window_is_read_for_every_head(stored):
    pages, both = stored
    keys, values = pages.window(57, 64)
    kv = both.read()
    assert torch.allclose(keys, kv.keys[:, :, 57:64].flatten(0, 1), atol=1e-5)
    assert torch.allclose(values, kv.values[:, :, 57:64].flatten(0, 1), atol=1e-5)


def test_keys_and_positions_of_one_head_are_read_without_values(stored):
    pages, both = stored
    kv = both.read()
    assert torch.allclose(pages.keys(2, 10, 70), kv.keys[1, 0, 10:70], atol=1e-5)
    assert pages.positions(1, 55, 65).tolist() == list(range(55, 65))


def test_pages_of_one_history_have_one_lineage(make, tier):
    first, second = make(slots(FIRST, rows=ROWS)), make(slots(SECOND, rows=ROWS, first=FIRST))
    pages = first.pages(tier).append(none_of(first), first)
    assert pages.append(first.counts, second).lineage is pages.lineage
    other = make(slots(FIRST, rows=ROWS))
    assert other.pages(tier).append(none_of(other), other).lineage is not pages.lineage


def test_older_pages_still_read_their_slots(make, tier):
    first, second = make(slots(FIRST, rows=ROWS)), make(slots(SECOND, rows=ROWS, first=FIRST))
    pages = first.pages(tier).append(none_of(first), first)
    pages.append(first.counts, second)
    again = pages.whole(first.counts)
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(again.tensors(), first.tensors(), strict=True))


def test_everything_held_is_named_once(stored):
    names = [name for name, _ in stored[0].tensors()]
    assert len(names) == len(set(names))
    assert not [name for name in names if "." in name]
