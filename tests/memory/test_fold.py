"""A fold: sinks are set apart first, what a method keeps joins the folded part, and nothing is half done."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from kvfold.errors import BudgetError
from kvfold.memory.context import Selection, in_all_heads
from kvfold.memory.fold import pin
from kvfold.memory.forward import Text
from kvfold.memory.kv import KV
from kvfold.memory.recorders import TokenIds
from kvfold.memory.state import LayerState
from kvfold.plan import Plan
from kvfold.select.base import JointSelect, Select
from memories import HEADS, LAYERS, PINNED, SIZE, Fed, rules_of, tail_of


def state_of(valid):
    tail = tail_of(torch.as_tensor(valid))
    return LayerState(tail=tail, seen=tuple(tail.valid.sum(dim=1).tolist()))


def test_the_first_real_tokens_of_each_row_become_sinks():
    valid = torch.tensor([[True] * 7, [False, False, True, True, True, True, True]])
    state = pin(state_of(valid), rules_of(), 7)
    assert state.pinned_of_rows == [PINNED, PINNED]
    assert state.sinks.read().positions[:, 0].tolist() == [[0, 1, 2, 3]] * 2
    assert state.tail.valid.sum(dim=1).tolist() == [3, 1]


def test_sinks_come_from_the_folded_columns_only_and_are_filled_up_later():
    state = pin(state_of([[True] * 7]), rules_of(), 2)
    assert state.pinned_of_rows == [2]
    later = pin(state, rules_of(), 5)
    assert later.sinks.read().positions[0, 0].tolist() == [0, 1, 2, 3]
    assert later.tail.valid[0].tolist() == [False] * 4 + [True] * 3


def test_full_sinks_are_left_alone():
    state = pin(state_of([[True] * 7]), rules_of(), 7)
    assert pin(state, rules_of(), 7) is state


def test_a_plan_without_pinned_tokens_has_sinks_without_slots():
    state = pin(state_of([[True] * 7]), rules_of(pinned=0), 7)
    assert state.sinks.slots == 0
    assert bool(state.tail.valid.all())


def test_a_fold_of_some_columns_leaves_the_others_raw():
    run = Fed("streaming_llm(tokens=9)")
    run.forward(20, seed=1)
    run.memory.fold(until=14)
    assert run.kept(0) == [[[0, 1, 2, 3, 9, 10, 11, 12, 13, *range(14, 20)]] * HEADS]
    assert run.memory.layers[0].state.tail.start == 14


def test_folding_twice_without_new_tokens_changes_nothing():
    run = Fed("streaming_llm(tokens=9)")
    run.forward(20, seed=1)
    run.memory.fold()
    before = run.kept(0)
    run.memory.fold()
    assert run.kept(0) == before


def test_folded_slots_keep_the_numbers_of_their_tokens():
    run = Fed("streaming_llm(tokens=9)")
    run.forward(20, seed=1)
    run.memory.fold()
    folded = run.memory.layers[2].state.folded.read()
    assert torch.equal(folded.keys, run.tokens[2][0].keys[:, :, 15:])
    assert torch.equal(folded.values, run.tokens[2][0].values[:, :, 15:])


def test_pads_are_never_folded():
    run = Fed("streaming_llm(tokens=99)", rows=3)
    run.forward(9, seed=1, pads=True)
    run.memory.fold()
    assert [row[0] for row in run.kept(0)] == [list(range(9 - row)) for row in range(3)]


def test_a_fold_may_say_late_that_columns_were_pads():
    run = Fed("streaming_llm(tokens=99)", rows=2)
    run.forward(9, seed=1)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    run.memory.fold(valid)
    assert [row[0] for row in run.kept(0)] == [list(range(9)), list(range(6))]
    assert run.memory.seen == (9, 6)


def test_a_fold_that_drops_nothing_gives_back_only_the_room_beyond_what_buffers_grow_by():
    run = Fed("full")
    run.forward(40, seed=1)
    before = run.ledger()
    assert before.slack_bytes > 0
    run.memory.fold()
    assert run.ledger() == before, "each turn would copy the whole text"
    run.memory.crop(10)
    run.memory.fold()
    assert run.ledger().slack_bytes == 0
    assert run.memory.layers[0].state.folded is None


def test_records_follow_a_fold_and_leave_when_nothing_raw_is_left():
    run = Fed("snapkv(tokens=9, window=4)")
    run.forward(20, seed=1)
    run.memory.fold(until=18)
    assert run.memory.layers[0].state.recent.positions.tolist() == [[18, 19]]
    run.memory.fold()
    assert run.memory.layers[0].state.recent is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint(JointSelect):
    """Keeps the newest slot of a segment and makes one of zeros; fails where it should."""

    fails: bool = False
    budget: Any = None

    paper: ClassVar[str | None] = None

    def __post_init__(self):
        """Any budget will do."""

    def choose(self, context):
        """The newest token of each row, and one made slot at position 1."""
        segment = context.segment
        if self.fails:
            raise KeyboardInterrupt
        kept = segment.nothing_kept()
        for row in range(len(segment.real)):
            kept[row, :, :, segment.tokens(row)[-1]] = True
        zeros = torch.zeros(len(kept), HEADS, 1, SIZE)
        first_row = torch.tensor([[row == 0] for row in range(len(kept))])
        made = KV(zeros, zeros, torch.ones(len(kept), HEADS, 1, dtype=torch.long))
        return Selection(
            kept={layer: kept[:, at] for at, layer in enumerate(context.layers)},
            made=dict.fromkeys(context.layers, made),
            made_kept=in_all_heads(dict.fromkeys(context.layers, made), first_row),
        )


def joint(rows=1, **settings):
    return Fed(Plan(select=Joint(**settings)), rows=rows)


def test_a_joint_method_folds_each_segment_once_in_all_layers():
    run = joint()
    run.forward(10, seed=1)
    run.memory.fold()
    run.forward(5, seed=2)
    run.memory.fold()
    for index in LAYERS:
        assert run.kept(index) == [[[0, 1, 1, 1, 2, 3, 9, 14]] * HEADS]


def test_slots_that_a_method_makes_join_the_rows_that_have_them():
    run = joint(rows=2)
    run.forward(10, seed=1)
    run.memory.fold()
    folded = run.memory.layers[0].state.folded
    assert folded.counts == ((2, 2), (1, 1))
    assert (folded.take_rows([0]).read().keys[0, :, 1] == 0).all()


def test_a_joint_fold_that_is_interrupted_changes_no_layer():
    run = joint(fails=True)
    run.forward(10, seed=1)
    with pytest.raises(KeyboardInterrupt):
        run.memory.fold()
    assert all(layer.state.folded is None for layer in run.memory.layers.values())
    assert run.kept(0) == [[list(range(10))] * HEADS]


def test_ids_of_folded_columns_leave_the_transcript():
    run = joint()
    run.forward(6, seed=1)
    run.memory.transcript = run.memory.transcript.with_ids(torch.arange(6)[None])
    run.memory.fold(until=5)
    assert run.memory.transcript.ids.tolist() == [[5]]


READ: list[tuple[list[int], list[int]]] = []  # ids and positions of the tokens that `ById` was asked about


@dataclass(frozen=True, slots=True, kw_only=True)
class ById(Select):
    """A method that folds layer by layer, again and again, and reads token ids; it keeps no slot."""

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    @property
    def records(self):
        """The ids of the text."""
        return (TokenIds(),)

    def choose(self, context):
        """Nothing stays."""
        real = context.segment.real
        READ.append((context.token_ids()[real].tolist(), context.segment.positions[real].tolist()))
        return Selection.of_layers(context.layers, context.segment.nothing_kept())


@pytest.mark.parametrize("sizes", [(30,), (7, 13, 1, 9), (1,) * 30])
def test_ids_are_those_of_the_folded_columns_however_they_came(sizes):
    READ.clear()
    run = Fed(Plan(select=ById(tokens=9)), prompt=10, stride=6)
    for size in sizes:
        ids = torch.arange(run.memory.fed, run.memory.fed + size)[None]  # a token's id is its position
        run.forward(size, seed=1, text=Text(ids=ids))
    segments = [list(range(PINNED, 10)), *([*range(at, at + 6)] for at in (10, 16, 22))]
    assert sorted(READ) == sorted((segment, segment) for segment in segments for _ in LAYERS)
    assert run.memory.transcript.ids.tolist() == [[28, 29]]


def test_a_smaller_budget_than_what_is_folded_for_good_is_refused():
    run = Fed("chunkkv(tokens=14)")
    run.forward(30, seed=1)
    run.memory.fold()
    smaller = rules_of("chunkkv(tokens=9)")
    with pytest.raises(BudgetError, match="10 are held, and a segment is folded once; give room for 10"):
        run.memory.set_rules(smaller)
    assert run.memory.rules.select.tokens == 14
