"""Slots are fetched from a far tier as their layout reads them, dense, rounded or of few dimensions."""

import pytest
import torch
from kvfold.memory.asking import Asking

import ranks
from kvfold.attention.partial import Partial
from kvfold.encode.int4 import Int4
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.memory.kv import KV
from kvfold.memory.part import Part
from kvfold.place.sentkv import SentKV

ROWS, HEADS, SIZE = 2, 2, 8


def memory(tokens, *, first=0):
    torch.manual_seed(first)
    positions = torch.arange(first, first + tokens).expand(ROWS, HEADS, -1)
    return KV(torch.randn(ROWS, HEADS, tokens, SIZE), torch.randn(ROWS, HEADS, tokens, SIZE), positions)


def low_rank(kv, **way):
    torch.manual_seed(5)
    form = ranks.form(HEADS, SIZE, **way)
    everything = torch.ones(kv.positions.shape, dtype=torch.bool)
    return LowRankPart.of(kv, everything, lambda keys, values, positions: positions.long() * 5 % 8, form)


def as_bytes(kv):
    return low_rank(kv, parts=HEADS, codes=True)


def rounded(kv):
    return Int4().pack(kv, torch.ones(kv.positions.shape, dtype=torch.bool))


def policy(budget=24):
    return SentKV(budget=budget, length=5, window=2, recent=2).open(pinned=0)


@pytest.mark.parametrize("made", [low_rank, as_bytes])
def test_latents_lie_on_disk_as_well(made, tmp_path):
    on_disk = SentKV(budget=24, length=5, window=2, recent=2, tier="disk", directory=str(tmp_path)).open(pinned=0)
    first, second, both = pieces(made)
    part, queries = on_disk.place(first, None).extend(second), torch.randn(ROWS, 4, 3, SIZE)
    assert near(part.attend(queries, scale=0.3), both.attend(queries, scale=0.3))


def near(one: Partial, other: Partial) -> bool:
    return torch.allclose(one.output, other.output, atol=1e-5) and torch.allclose(
        one.log_sum_exp, other.log_sum_exp, atol=1e-5
    )


def pieces(made) -> tuple[Part, Part, Part]:
    """The first part, the second, and both as one."""
    first, second = made(memory(60)), made(memory(31, first=60))
    return first, second, made(memory(60)).extend(second)


@pytest.mark.parametrize("made", [low_rank, as_bytes, rounded])
def test_everything_is_read_as_the_layout_reads_it(made):
    first, second, both = pieces(made)
    part, queries = policy().place(first, None).extend(second), torch.randn(ROWS, 4, 3, SIZE)
    assert near(part.attend(queries, scale=0.3), both.attend(queries, scale=0.3))
    for (name, one), (_, other) in zip(part.shelf.whole(part.counts).tensors(), both.tensors(), strict=True):
        assert torch.equal(one, other), name
    assert part.places(1, 1).tolist() == both.places(1, 1).tolist()


@pytest.mark.parametrize("made", [low_rank, as_bytes, rounded])
def test_what_is_selected_is_fetched_and_nothing_else(made):
    first, second, both = pieces(made)
    part, queries = policy().place(first, None).extend(second), torch.randn(ROWS, 4, 1, SIZE)
    asking = Asking(queries=queries, scale=0.3, valid=None, window=None, ended=None)
    asked = part.asked(asking)
    answer = asked.attend(queries, scale=0.3)
    whole, _ = both.read()
    lanes = asked.selected.long().view(ROWS, HEADS, -1, 1).expand(-1, -1, -1, SIZE)
    keys, values = whole.keys.gather(2, lanes), whole.values.gather(2, lanes)
    scores = queries.view(ROWS, HEADS, 2, SIZE) @ keys.mT * 0.3
    assert torch.allclose(answer.output.view(ROWS, HEADS, 2, SIZE), scores.softmax(-1) @ values, atol=1e-5)
    assert asked.working.spent.fetched == 24 * ROWS * HEADS
    if made is low_rank:
        in_full = 24 * ROWS * HEADS * 2 * SIZE * 4
        assert asked.working.spent.fetched_bytes < in_full * HEADS  # latents of all heads, fewer than in full


@pytest.mark.parametrize("made", [low_rank, as_bytes, rounded])
def test_rows_and_what_is_kept_lie_as_their_layout_would_have_them(made):
    first, second, both = pieces(made)
    part = policy().place(first, None).extend(second)
    queries = torch.randn(ROWS, 4, 2, SIZE)
    turned = part.rows([1, 0])
    assert near(turned.attend(queries, scale=0.3), both.rows([1, 0]).attend(queries, scale=0.3))
    kept = torch.arange(91).repeat(ROWS * HEADS) % 3 > 0
    assert near(part.keep(kept).attend(queries, scale=0.3), both.keep(kept).attend(queries, scale=0.3))
