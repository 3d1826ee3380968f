"""Slots are moved together head by head, raw tokens behind them, and a fold that fails moves nothing."""

import pytest
import torch

from kvfold.attention.rotary import Rotary
from kvfold.encode.dense import Dense
from kvfold.errors import CacheError
from kvfold.memory.compaction import gathered
from kvfold.memory.dense import DensePart
from kvfold.memory.forward import Boundaries
from kvfold.memory.kv import KV
from kvfold.memory.memory import Memory
from kvfold.memory.part import Part
from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.transcript import Transcript
from kvfold.plan import Plan
from memories import HEADS, LAYERS, PINNED, SCALE, SIZE, new_tokens, observed, tail_of
from plans import Uneven


def turning():
    """Rotations by a tenth of a radian a position, the same for all pairs."""

    def angles(positions):
        turns = positions[:, None].float() / 10
        return turns.cos().expand(-1, SIZE), turns.sin().expand(-1, SIZE)

    return Rotary(angles=angles)


def memory_of(plan):
    rules = plan.rules(pinned=PINNED, layers=len(LAYERS), rotary=turning())
    return Memory(rules, layers=LAYERS, boundaries=Boundaries(prompt=0))


def feed(memory, count, *, rows=1, valid=None):
    """New tokens at the positions that come next."""
    first = next(iter(memory.layers.values())).state.next_positions or (0,) * rows
    forward = memory.begin(count)
    for index in memory.layers:
        forward.attend(index, new_tokens(count, rows=rows, first=first, valid=valid), scale=SCALE)
    memory.commit()


def states(memory):
    return [layer.state for layer in memory.layers.values()]


def test_slots_of_each_head_end_where_the_text_goes_on_behind_the_fullest():
    memory = memory_of(Plan(select=Uneven(tokens=14)))
    feed(memory, 60)
    memory.fold()
    for state in states(memory):
        assert isinstance(state.folded, DensePart)
        counts = state.folded.counts[0]
        assert len(set(counts)) == HEADS, "heads differ"
        end = PINNED + max(counts)
        wanted = [position for count in counts for position in range(end - count, end)]
        assert state.folded.without_room().positions.tolist() == wanted
        assert state.next_positions == (end,)
        assert state.closed == (60 - end,)


def test_rows_have_their_own_positions():
    memory = memory_of(Plan.parse("streaming_llm(tokens=10)"))
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :13] = False
    forward = memory.begin(20)
    for index in memory.layers:
        new = new_tokens(20, rows=2, valid=valid)
        positions = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
        forward.attend(index, type(new)(**{**_fields(new), "positions": positions}), scale=SCALE)
    memory.commit()
    memory.fold()
    assert [state.next_positions for state in states(memory)] == [(10, 7)] * len(LAYERS)
    memory.take_rows([1, 0, 0])
    assert [state.next_positions for state in states(memory)] == [(7, 10, 10)] * len(LAYERS)


def _fields(new):
    return {name: getattr(new, name) for name in type(new).__dataclass_fields__}


def test_an_undone_fold_and_a_crop_find_their_positions_again():
    memory = memory_of(Plan.parse("streaming_llm(tokens=10)"))
    feed(memory, 20)
    before = memory.mark()
    memory.fold()
    feed(memory, 5)
    memory.crop(3)
    assert [state.next_positions for state in states(memory)] == [(12,)] * len(LAYERS)
    memory.restore(before)
    assert [state.next_positions for state in states(memory)] == [(20,)] * len(LAYERS)


def test_a_fold_that_fails_in_one_layer_leaves_the_text_where_it_was(monkeypatch):
    memory = memory_of(Plan.parse("streaming_llm(tokens=10)"))
    feed(memory, 20)
    fold = type(memory.layers[2]).fold

    def failing(layer, *args, **more):
        if layer.index == 2:
            raise CacheError("no room")
        fold(layer, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory.layers[2]), "fold", failing)
        with pytest.raises(CacheError, match="no room"):
            memory.fold()
    assert [state.next_positions for state in states(memory)] == [(20,)] * len(LAYERS)
    feed(memory, 4)
    memory.fold()
    assert [state.next_positions for state in states(memory)] == [(10,)] * len(LAYERS)


def test_recent_queries_turn_with_their_tokens():
    rotary, tail = turning(), tail_of([[True] * 6])
    queries = torch.randn(1, 4, 6, SIZE)
    window = RecentQueries(4).open(tail.keys).observe(observed(queries, tail))
    moved = window.moved(torch.tensor([2]), rotary.turn)
    assert moved.positions.tolist() == [[0, 1, 2, 3]]
    wanted = rotary.turn(queries[0, 0, 2:], torch.arange(2, 6), torch.arange(4))
    assert torch.allclose(moved.queries[0, 0], wanted)


def test_latents_that_must_move_are_refused():
    class Latents(Part):
        counts = ((1, 1),)

    Latents.__abstractmethods__ = frozenset()  # nothing of it is asked
    with pytest.raises(CacheError, match="a Latents cannot write single slots again"):
        gathered(Latents(), [5], turning())  # pyright: ignore[reportAbstractUsage]


def test_rows_that_stand_among_older_slots_keep_their_place_in_the_text():
    def part_at(*positions):
        shape = (1, 1, len(positions))
        kv = KV(torch.randn(*shape, SIZE), torch.randn(*shape, SIZE), torch.tensor(positions).view(shape))
        return DensePart.of(kv, Dense())

    part = part_at(10, 50, 90).extend(part_at(30, 70), Transcript())
    moved = gathered(part, [25], turning())
    assert moved.without_room().positions.tolist() == [20, 22, 24, 21, 23]
    keys = turning().turn(part.without_room().payload["keys"], part.without_room().positions, moved.positions)
    torch.testing.assert_close(moved.without_room().payload["keys"], keys)
