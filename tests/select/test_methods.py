"""Each method against its paper's rule written out: what stays, in small cases that a person can check."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contexts import window_of
from kvfold.errors import KvfoldError
from kvfold.memory.attention_sums import AttentionSums
from kvfold.memory.candidates import Candidates
from kvfold.memory.kv import KV
from kvfold.memory.recent_queries import RecentQueries
from kvfold.plan import members
from kvfold.select.base import best, newest
from kvfold.select.full import Full
from kvfold.select.h2o import H2O
from kvfold.select.none import Nothing
from kvfold.select.snapkv import SnapKV
from kvfold.select.streaming_llm import StreamingLLM

SELECTS = members("select")


def memory(slots, *, rows=1, heads=2, first=4):
    positions = torch.arange(first, first + slots).expand(rows, heads, slots)
    return KV(torch.randn(rows, heads, slots, 4), torch.randn(rows, heads, slots, 4), positions)


def candidates(kv, slots, *, sums=None, window=3):
    """So many of these slots may stay; queries stand behind every slot."""
    rows, heads, held = kv.positions.shape
    seen = int(kv.positions.max()) + 1
    queries = torch.randn(rows, heads * 2, window, 4)
    scores = queries @ kv.keys.repeat_interleave(2, dim=1).mT * 0.5
    return Candidates(
        kv=kv,
        slots=slots,
        scale=0.5,
        seen=torch.full((rows,), seen),
        shared_heads=False,
        hidden_states=torch.randn(rows, held, 6),
        attention_sums=torch.rand(rows, heads, held) if sums is None else sums,
        recent=window_of(queries, scores.logsumexp(dim=-1), torch.arange(seen - window, seen).expand(rows, window)),
    )


def positions(kv, kept):
    """What stays of the first row's first head."""
    return kv.positions[0, 0][kept[0, 0]].tolist()


@pytest.mark.parametrize(
    "name", [name for name, kind in SELECTS.items() if name not in ("full", "none") and not kind.chooses_jointly]
)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_choice_keeps_at_most_what_it_may_and_something(name, data):
    slots = data.draw(st.integers(2, 40))
    allowed = data.draw(st.integers(1, slots - 1))
    kv = memory(slots, rows=data.draw(st.integers(1, 3)), heads=data.draw(st.integers(1, 3)))
    kept = SELECTS[name](tokens=9).choose_slots(candidates(kv, allowed, window=data.draw(st.integers(1, 5))))
    assert kept.shape == kv.positions.shape
    counts = kept.sum(dim=2)
    assert (counts <= allowed).all()
    assert (counts >= 1).all()
    assert kept[:, :, -1].all()  # the newest token stays in every method


def test_streaming_llm_keeps_the_newest():
    kv = memory(10)
    assert positions(kv, StreamingLLM(tokens=9).choose_slots(candidates(kv, 3))) == [11, 12, 13]


def test_h2o_keeps_the_newest_half_and_the_heaviest():
    kv = memory(10)
    sums = torch.tensor([0, 9, 0, 0, 8, 0, 7, 0, 0, 0.0]).expand(1, 2, 10)
    chosen = H2O(tokens=9, normalise=False).choose_slots(candidates(kv, 4, sums=sums))
    assert positions(kv, chosen) == [5, 8, 12, 13]


def test_h2o_divides_by_how_many_queries_could_see_a_slot():
    kv = memory(10)
    sums = torch.tensor([5, 5, 5, 5, 4, 4, 0, 0, 0, 0.0]).expand(1, 2, 10)  # a slot at 13 - n was seen by n + 1 queries
    chosen = H2O(tokens=9).choose_slots(candidates(kv, 4, sums=sums))
    assert positions(kv, chosen) == [7, 9, 12, 13]
    plain = H2O(tokens=9, normalise=False).choose_slots(candidates(kv, 4, sums=sums))
    assert positions(kv, plain) == [4, 5, 12, 13]


def test_h2o_gives_all_to_one_side_when_told():
    kv = memory(10)
    sums = torch.arange(10, 0, -1).float().expand(1, 2, 10)
    assert positions(kv, H2O(tokens=9, recent=1.0).choose_slots(candidates(kv, 3, sums=sums))) == [11, 12, 13]
    assert positions(kv, H2O(tokens=9, recent=0.0).choose_slots(candidates(kv, 3, sums=sums))) == [4, 5, 13]


def test_snapkv_scores_are_the_attention_of_its_window():
    kv = memory(12)
    seen = candidates(kv, 3)
    found = SnapKV(tokens=9).scores(seen)
    scores = (seen.recent.queries @ kv.keys.repeat_interleave(2, dim=1).mT * 0.5).masked_fill(
        seen.recent.positions[0][:, None] < kv.positions[0, 0], -torch.inf
    )
    weights = (scores - seen.recent.log_sum_exp[..., None]).exp()
    wanted = weights.sum(dim=2).unflatten(1, (2, 2)).mean(dim=2)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_window", [False, True])
def test_snapkv_keeps_its_window_and_what_it_looks_at(in_window):
    keys = torch.zeros(1, 1, 20, 4)
    keys[0, 0, 5] = 10.0  # every query looks here
    if in_window:
        keys[0, 0, 18] = 20.0  # looked at more, and no reason to keep the slots before it
    kv = KV(keys, keys, torch.arange(20).expand(1, 1, 20))
    queries = torch.ones(1, 1, 2, 4)
    seen = Candidates(
        kv=kv,
        slots=5,
        scale=1.0,
        seen=torch.tensor([20]),
        shared_heads=False,
        recent=window_of(queries, (queries @ keys.mT).logsumexp(dim=-1), torch.tensor([[18, 19]])),
    )
    kept = SnapKV(tokens=9, window=2, pool=3).choose_slots(seen)
    assert positions(kv, kept) == [4, 5, 6, 18, 19]


def test_snapkv_ignores_queries_that_are_no_tokens():
    kv = memory(12)
    seen = candidates(kv, 3)
    recent = seen.recent
    blank = window_of(
        torch.cat([torch.full_like(recent.queries[:, :, :1], 1e4), recent.queries], dim=2),
        torch.cat([torch.zeros(1, 4, 1), recent.log_sum_exp], dim=2),
        torch.cat([torch.tensor([[-1]]), recent.positions], dim=1),
    )
    method = SnapKV(tokens=9)
    assert torch.allclose(method.scores(replace(seen, recent=blank)), method.scores(seen))


def test_full_and_none_keep_everything_and_nothing():
    kv = memory(5)
    assert Full().choose_slots(candidates(kv, 5)).all()
    assert not Nothing().choose_slots(candidates(kv, 0)).any()
    assert Full().budget is None
    assert Nothing().budget.slots(seen=9, pinned=4, slot_bytes=1, token_bytes=1, shares=1) == 4
    assert Nothing().budget.slots(seen=2, pinned=4, slot_bytes=1, token_bytes=1, shares=1) == 2


def test_equal_scores_keep_the_older():
    kept = best(torch.ones(1, 1, 6), 2, among=torch.tensor([[[False, True, True, True, True, True]]]))
    assert kept[0, 0].tolist() == [False, True, True, False, False, False]
    assert newest(memory(4), 0).sum() == 0


@pytest.mark.parametrize("name", SELECTS)
def test_every_method_says_whether_it_looks_at_queries_and_its_paper(name):
    kind = SELECTS[name]
    assert isinstance(kind.query_aware, bool)
    try:
        method = kind(tokens=9)
    except KvfoldError:
        method = kind()
    reads_queries = any(isinstance(recorder, RecentQueries | AttentionSums) for recorder in method.records)
    assert kind.query_aware == reads_queries
