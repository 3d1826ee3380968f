"""A layer's state: a value of which rows, columns and pads are taken together, in every holder at once."""

import pytest
import torch

from kvfold.encode.dense import Dense
from kvfold.errors import CacheError
from kvfold.memory.dense import DensePart
from kvfold.memory.recent_queries import QueryWindow
from kvfold.memory.state import LayerState
from memories import HEADS, QUERY_HEADS, SIZE, Fed, slots, tail_of


def window_at(positions):
    marked = torch.tensor(positions, dtype=torch.int32)
    rows, count = marked.shape
    return QueryWindow(
        queries=torch.randn(rows, QUERY_HEADS, count, SIZE),
        log_sum_exp=torch.randn(rows, QUERY_HEADS, count),
        positions=marked,
        width=4,
    )


def state_of(rows=2, columns=5):
    """Two sinks, three folded slots and raw columns behind them."""
    return LayerState(
        sinks=DensePart.of(slots(2, rows=rows), Dense()),
        folded=DensePart.of(slots(3, rows=rows, first=2), Dense()),
        tail=tail_of(torch.ones(rows, columns, dtype=torch.bool)),
        recorded={"window": window_at([[2, 3, 4]] * rows)},
        seen=(5 + columns,) * rows,
    )


def test_an_empty_state_holds_nothing():
    state = LayerState()
    assert list(state.holders()) == []
    assert list(state.tensors()) == []
    assert state.recent is None
    assert state.pinned_of_rows == []


def test_everything_held_is_named_after_its_holder():
    names = [name for name, _ in state_of().tensors()]
    assert names[:3] == ["sinks.keys", "sinks.values", "sinks.positions"]
    assert {name.split(".")[0] for name in names} == {"sinks", "folded", "tail", "window"}
    assert len(names) == len(set(names))


def test_slots_are_counted_by_row():
    state = state_of()
    assert state.pinned_of_rows == [2, 2]
    assert state.folded_of_rows == [(3, 3), (3, 3)]
    assert LayerState(seen=(4, 4)).folded_of_rows == [(), ()]
    assert LayerState(seen=(4, 4)).pinned_of_rows == [0, 0]


def test_what_lies_on_the_device_is_in_no_tier():
    assert state_of().tier_of("folded.keys") is None
    assert state_of().tier_of("tail.keys") is None


def test_offloaded_tensors_name_their_tier():
    run = Fed("sentkv(budget=0.5)").lived()
    state = run.memory.layers[0].state
    tiers = {name: state.tier_of(name) for name, _ in state.tensors()}
    assert "host" in tiers.values()
    assert tiers["tail.keys"] is None


def test_rows_are_taken_from_every_holder():
    state = state_of(rows=3)
    picked = state.take_rows([2, 0])
    assert torch.equal(picked.tail.keys[0], state.tail.keys[2])
    assert torch.equal(picked.folded.read().keys[1], state.folded.read().keys[0])
    assert torch.equal(picked.records["window"].queries[0], state.records["window"].queries[2])
    assert picked.seen == state.seen[:2]
    assert len(picked.pinned_of_rows) == 2


def test_columns_that_turn_out_to_be_pads_leave_counts_and_windows_too():
    state = state_of()
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    after = state.invalidated(valid)
    assert after.seen == (10, 8)
    assert after.tail.valid[1].tolist() == [True, True, True, False, False]
    assert after.records["window"].positions[0].tolist() == [2, 3, 4]
    assert [at for at in after.records["window"].positions[1].tolist() if at >= 0] == [2]
    assert state.tail.valid.all()


def test_a_mask_that_changes_nothing_gives_the_same_state():
    state = state_of()
    assert state.invalidated(torch.ones(2, 5, dtype=torch.bool)) is state
    assert LayerState().invalidated(torch.ones(2, 0, dtype=torch.bool)) == LayerState()


def test_a_crop_forgets_the_newest_columns_everywhere():
    state = state_of()
    after = state.cropped(2, allowed=True)
    assert after.tail.length == 3
    assert after.seen == (8, 8)
    assert state.tail.length == 5
    assert state.cropped(0, allowed=False) is state


def test_a_crop_counts_the_real_tokens_of_each_row():
    state = state_of()
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 4] = False
    assert state.invalidated(valid).cropped(2, allowed=True).seen == (8, 8)


def test_folded_tokens_cannot_be_cropped():
    with pytest.raises(CacheError, match="only the newest 5 are still raw; fold later or crop less"):
        state_of().cropped(6, allowed=True)
    with pytest.raises(CacheError, match="only the newest 0 are still raw"):
        LayerState().cropped(1, allowed=True)


def test_tokens_in_a_sum_cannot_be_cropped():
    with pytest.raises(CacheError, match="use a plan that keeps no such sums"):
        state_of().cropped(1, allowed=False)


def test_a_fresh_tail_is_a_copy_and_the_rest_is_shared():
    state = state_of()
    fresh = state.with_fresh_tail()
    assert fresh.folded is state.folded
    assert fresh.tail.keys.data_ptr() != state.tail.keys.data_ptr()
    assert torch.equal(fresh.tail.keys, state.tail.keys[:, :, :5])
    assert LayerState().with_fresh_tail() == LayerState()
    assert fresh.tail.keys.shape[1] == HEADS
