"""After any sequence of selections the slots hold exactly what was selected, and only misses were fetched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.memory.store import TierStore
from kvfold.place.tiers.device import DeviceTier
from kvfold.place.tiers.host import HostTier
from kvfold.place.working_set import WorkingSet

STORED, HEADS = 40, 4


def stored(tier):
    """A store whose keys and values say where they lie."""
    numbers = torch.arange(HEADS * STORED, dtype=torch.float32)[:, None]
    payload = {"keys": numbers.expand(-1, 3).clone(), "values": -numbers.expand(-1, 2).clone()}
    return TierStore(tier, torch.device("cpu")).append((0,) * HEADS, payload, [STORED] * HEADS)


def fetching(store):
    """How pages fetch from it."""

    def fetch(heads, slots):
        found = store.gather(heads * store.capacity + slots, ["keys", "values"])
        return found["keys"], found["values"], sum(one.nbytes for one in found.values())

    return fetch


def select(working, store, chosen):
    """Fetch a list of slots per head."""
    most = max(map(len, chosen))
    wanted = torch.tensor([[*own, *[-1] * (most - len(own))] for own in chosen], dtype=torch.int32)
    working.fetch(wanted, fetching(store), stored=STORED, heads=2)


@st.composite
def selections(draw):
    """Some selections one after the other; budgets differ by head and change in between."""
    return [
        [draw(st.lists(st.integers(0, STORED - 1), min_size=1, max_size=12, unique=True)) for _ in range(HEADS)]
        for _ in range(draw(st.integers(1, 8)))
    ]


@settings(max_examples=100, deadline=None)
@given(life=selections())
def test_slots_hold_exactly_what_is_selected(life):
    working, store = WorkingSet(), stored(HostTier())
    model, before, fetched, room = [set() for _ in range(HEADS)], None, 0, 0
    for chosen in life:
        select(working, store, chosen)
        most = max(map(len, chosen))
        if before is None or most < room:
            model = [set() for _ in range(HEADS)]
        fetched += sum(len(set(own) - held) for own, held in zip(chosen, model, strict=True))
        room, before = most, chosen
        for head, own in enumerate(chosen):
            valid = torch.ones(most, dtype=torch.bool) if working.valid is None else working.valid[head]
            assert sorted(working.slots[head][valid].tolist()) == sorted(own)
            keys, values = working.keys[head][valid][:, 0], working.values[head][valid][:, 0]
            assert torch.equal(keys, (working.slots[head][valid] + head * STORED).float())
            assert torch.equal(keys, -values)
            model[head] = {slot for slot in working.slots[head].tolist() if slot >= 0}
        assert working.stats.fetched == fetched


def test_slots_of_a_past_that_was_written_anew_are_fetched_again():
    working, store = WorkingSet(), stored(HostTier())
    more = {"keys": torch.full((HEADS, 3), 7.0), "values": torch.full((HEADS, 2), 7.0)}
    store = store.append((STORED,) * HEADS, more, [1] * HEADS)
    other = store.append((STORED,) * HEADS, {name: one + 1 for name, one in more.items()}, [1] * HEADS)
    wanted = torch.full((HEADS, 1), STORED, dtype=torch.int32)
    for one, number in ((store, 7), (other, 8), (store, 7)):
        working.fetch(wanted.clone(), fetching(one), stored=STORED + 1, heads=2, lineage=one.lineage)
        assert bool((working.keys == number).all())


def test_what_is_there_is_not_fetched_again():
    working, store = WorkingSet(), stored(DeviceTier())
    select(working, store, [[1, 2, 3, 4]] * HEADS)
    select(working, store, [[1, 2, 3, 9], [1, 2, 3, 4], [5, 6, 3, 4], [9, 8, 7, 6]])
    stats = working.stats
    assert (stats.selections, stats.wanted, stats.reused, stats.fetched) == (1, 16, 9, 16 + 7)
    assert stats.reused_evenly == 2 * 3 + 0
    assert stats.fetched_bytes == (16 + 7) * 5 * 4


def test_a_store_is_written_behind_and_a_second_future_writes_into_a_copy():
    store = stored(HostTier())
    more = {"keys": torch.full((HEADS, 3), 7.0), "values": torch.full((HEADS, 2), 7.0)}
    first = store.append((STORED,) * HEADS, more, [1] * HEADS)
    grown = first.append((STORED + 1,) * HEADS, more, [1] * HEADS)
    other = first.append((STORED + 1,) * HEADS, {name: one + 1 for name, one in more.items()}, [1] * HEADS)
    assert grown is first
    assert other is not first
    assert grown.flat((STORED + 2,) * HEADS)["keys"][STORED + 1, 0] == 7
    assert other.flat((STORED + 2,) * HEADS)["keys"][STORED + 1, 0] == 8
    assert torch.equal(other.flat((STORED,) * HEADS)["keys"], store.flat((STORED,) * HEADS)["keys"])


@pytest.mark.parametrize("call", range(1, 4))
def test_an_interrupt_leaves_no_slot_that_holds_another(call, monkeypatch):
    working, store = WorkingSet(), stored(HostTier())
    first = torch.tensor([[0, 1]] * HEADS, dtype=torch.int32)

    def fetch(wanted):
        working.fetch(wanted, fetching(store), stored=STORED, heads=2)

    fetch(first)
    calls, copied = [], torch.Tensor.index_copy_

    def interrupted(tensor, *given):
        calls.append(tensor)
        if len(calls) == call:
            raise KeyboardInterrupt
        return copied(tensor, *given)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "index_copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(torch.tensor([[2, 3]] * HEADS, dtype=torch.int32))
    fetch(first)
    assert torch.equal(working.keys[..., 0], (working.slots + STORED * torch.arange(HEADS)[:, None]).float())
    assert working.slots.sort(dim=1).values.tolist() == [[0, 1]] * HEADS
