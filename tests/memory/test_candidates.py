"""A method that chooses layer by layer is asked with plain rectangles, and what it answers is checked."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from kvfold.encode.dense import Dense
from kvfold.errors import CacheError
from kvfold.memory.recent_queries import RecentQueries
from kvfold.plan import Plan
from kvfold.select.base import PerLayerSelect, newest
from memories import HEADS, PINNED, Fed


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(PerLayerSelect):
    """Keeps the newest slots, or what `answer` says, and remembers what it was asked."""

    answer: Any = None
    reads: tuple = ()
    seen: list = field(default_factory=list, compare=False)

    query_aware: ClassVar[bool] = False
    paper: ClassVar[str | None] = None

    @property
    def records(self):
        """What the test wants recorded."""
        return self.reads

    def choose_slots(self, candidates):
        """The newest, unless something else is wanted."""
        self.seen.append(candidates)
        return newest(candidates.kv, candidates.slots) if self.answer is None else self.answer(candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHeads(Dense):
    """A layout whose heads share their slots."""

    shared_heads: ClassVar[bool] = True


def folded(method, *, rows=1, count=12, pads=False, encode=None, times=1):
    """A memory of one layer after folds by a method."""
    plan = Plan(select=method) if encode is None else Plan(select=method, encode=encode)
    run = Fed(plan, rows=rows, layers=(0,))
    for seed in range(times):
        run.forward(count, seed=seed, pads=pads)
        run.memory.fold()
    return run


def test_nothing_is_asked_where_everything_fits():
    method = Asked(tokens=12)
    folded(method)
    assert method.seen == []


def test_a_method_is_asked_for_what_its_budget_leaves_beside_the_sinks():
    method = Asked(tokens=9)
    run = folded(method)
    (asked,) = method.seen
    assert asked.slots == 9 - PINNED
    assert len(asked.kv) == 12 - PINNED
    assert asked.kv.positions[0, 0].tolist() == list(range(PINNED, 12))
    assert run.kept(0) == [[[0, 1, 2, 3, 7, 8, 9, 10, 11]] * HEADS]


def test_a_budget_for_sinks_alone_asks_nobody():
    method = Asked(keep=0.01)
    run = folded(method)
    assert method.seen == []
    assert run.kept(0) == [[[0, 1, 2, 3]] * HEADS]


def test_with_scope_history_folded_slots_compete_again():
    method = Asked(tokens=9)
    run = folded(method, times=2)
    again = method.seen[1]
    assert len(again.kv) == 5 + 12
    assert again.kv.positions[0, 0].tolist() == [*range(7, 12), *range(12, 24)]
    assert run.kept(0) == [[[0, 1, 2, 3, 19, 20, 21, 22, 23]] * HEADS]


def test_with_scope_turn_new_tokens_compete_among_themselves():
    method = Asked(keep=0.5, scope="turn")
    run = folded(method, times=2)
    first, second = method.seen
    assert second.kv.positions[0, 0].tolist() == list(range(12, 24))
    held_before = [at for at in run.kept(0)[0][0] if PINNED <= at < 12]
    assert len(held_before) == first.slots


def test_with_scope_turn_a_lowered_budget_makes_all_compete():
    method = Asked(tokens=14, scope="turn")
    run = folded(method)
    lower = Plan(select=Asked(tokens=8, scope="turn"))
    run.memory.set_rules(lower.rules(pinned=PINNED, layers=1))
    assert run.kept(0) == [[[0, 1, 2, 3, 8, 9, 10, 11]] * HEADS]


def test_rows_that_hold_and_fold_as_many_are_asked_for_together():
    method = Asked(tokens=9)
    folded(method, rows=3)
    (asked,) = method.seen
    assert asked.kv.keys.shape[0] == 3
    assert asked.seen.tolist() == [12, 12, 12]


def test_padded_rows_are_asked_for_by_themselves_and_without_pads():
    method = Asked(tokens=9)
    run = folded(method, rows=2, pads=True)
    assert [asked.kv.positions[0, 0].tolist() for asked in method.seen] == [list(range(4, 12)), list(range(4, 11))]
    assert [asked.seen.tolist() for asked in method.seen] == [[12], [11]]
    assert run.kept(0)[1] == [[0, 1, 2, 3, 6, 7, 8, 9, 10]] * HEADS


def uneven(candidates):
    """Head h keeps h slots fewer than it may."""
    kept = newest(candidates.kv, candidates.slots)
    if kept.shape[1] > 1:
        kept[:, 1] = newest(candidates.kv, candidates.slots - 1)[:, 1]
    return kept


def test_heads_that_hold_differently_are_asked_for_by_themselves():
    method = Asked(tokens=9, answer=uneven)
    run = folded(method)
    assert run.memory.layers[0].state.folded.counts == ((5, 4),)
    run.forward(4, seed=9)
    run.memory.fold()
    assert [len(asked.kv) for asked in method.seen[1:]] == [5 + 4, 4 + 4]
    assert [asked.kv.keys.shape[1] for asked in method.seen[1:]] == [1, 1]


def test_recorded_queries_come_with_the_heads_that_are_asked_for():
    method = Asked(tokens=9, answer=uneven, reads=(RecentQueries(3),))
    run = folded(method)
    assert method.seen[0].recent.positions.tolist() == [[9, 10, 11]]
    run.forward(4, seed=9)
    run.memory.fold()
    assert [asked.recent.queries.shape[1] for asked in method.seen[1:]] == [2, 2]


def test_nothing_comes_that_was_not_recorded():
    method = Asked(tokens=9)
    folded(method)
    (asked,) = method.seen
    assert (asked.recent, asked.attention_sums, asked.hidden_states) == (None, None, None)


def test_a_method_that_keeps_too_many_is_told_so():
    with pytest.raises(CacheError, match=r"Asked was asked to keep 5 of 8 slots; .* up to 8 slots; mend its"):
        folded(Asked(tokens=9, answer=lambda asked: torch.ones(asked.kv.positions.shape, dtype=torch.bool)))


def test_a_method_that_answers_with_another_shape_is_told_so():
    with pytest.raises(CacheError, match=r"a mask of \(1, 2, 1\)"):
        folded(Asked(tokens=9, answer=lambda asked: torch.ones(1, HEADS, 1, dtype=torch.bool)))


def test_a_method_whose_heads_differ_cannot_be_stored_where_heads_share_slots():
    with pytest.raises(CacheError, match="store slots in a way that does not share them"):
        folded(Asked(tokens=9, answer=uneven), encode=SharedHeads())


def test_a_method_hears_that_heads_share_their_slots():
    method = Asked(tokens=9)
    folded(method, encode=SharedHeads())
    assert method.seen[0].shared_heads


def test_a_method_that_fails_leaves_the_memory_as_it_was():
    run = Fed(Plan(select=Asked(tokens=9, answer=lambda asked: 1 / 0)), layers=(0,))
    run.forward(12, seed=0)
    with pytest.raises(ZeroDivisionError):
        run.memory.fold()
    assert run.kept(0) == [[list(range(12))] * HEADS]
