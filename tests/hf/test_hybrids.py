"""Models with recurrent layers beside attention layers: attention folds, states stay, and both go back together."""

import gc

import pytest
import torch
from transformers import DynamicCache

import kvfold
from driving import close, feed
from fakes import text
from families.builder import small_model
from kvfold.chat.rows import Rows
from kvfold.errors import CacheError
from kvfold.hf.batched import BatchedCache

FAMILIES = ("qwen3_next", "falcon_h1")  # states in layers of their own; states in the layers that fold


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return small_model(request.param)


def stock(model, pieces):
    cache, found = DynamicCache(config=model.config), []
    for piece in pieces:
        found.append(feed(model, piece, cache))
    return found


def test_a_forward_that_fails_half_way_leaves_no_trace_in_recurrent_states(model):
    first, then = text(1, 20), text(1, 5, seed=1)
    wanted = stock(model, [first, then])[1]
    cache = kvfold.cache(model, "full")
    feed(model, first, cache)
    last = next(module for module in reversed(list(model.modules())) if getattr(module, "is_causal", None) is not None)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, then, cache)
    hook.remove()
    assert close(feed(model, then, cache), wanted)


def test_a_mark_is_come_back_to_more_than_once(model):
    first, then = text(1, 20), text(1, 5, seed=1)
    cache = kvfold.cache(model, "full")
    feed(model, first, cache)
    mark = cache.mark()
    answers = []
    for _ in range(3):
        answers.append(feed(model, then, cache))
        cache.restore(mark)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_reset_cache_takes_another_number_of_rows(model):
    cache = kvfold.cache(model, "full")
    feed(model, text(2, 12), cache)
    cache.reset()
    assert close(feed(model, text(1, 12), cache), stock(model, [text(1, 12)])[0])


def test_states_are_counted_apart_and_do_not_grow(model):
    cache = kvfold.cache(model, "full")
    feed(model, text(1, 20), cache)
    before = cache.ledger().other_bytes
    feed(model, text(1, 20), cache)
    assert 0 < before == cache.ledger().other_bytes


def test_tokens_are_taken_back_by_marks_only(model):
    cache = kvfold.cache(model, "full")
    feed(model, text(1, 20), cache)
    with pytest.raises(CacheError, match="recurrent one has no way back"):
        cache.crop(-3)
    assert cache.memory.fed == 20


def test_a_reread_text_leaves_recurrent_states_as_they_were(model):
    caches = [kvfold.cache(model, plan, prompt_tokens=0) for plan in ("full", "kvzip(keep=0.9)")]
    for cache in caches:
        feed(model, text(1, 24), cache)
    caches[1].fold()
    states = [dict(state.tensors()) for cache in caches for state in cache.stock.states().values()]
    half = len(states) // 2
    for one, other in zip(states[:half], states[half:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_of_caches_refuses_recurrent_ones(model):
    with pytest.raises(CacheError, match="recurrent layers go row by row"):
        BatchedCache([kvfold.cache(model, "full")])
    gc.collect()


def test_rows_of_different_length_are_refused_in_one_line(model):
    rows = Rows(model, "full", rows=2)
    with pytest.raises(CacheError, match="pads count there; run such rows one by one"):
        rows.feed([[5, 6, 7], [8, 9]])
    rows.feed([[5, 6], [8, 9]])
    assert rows.fed_tokens == [2, 2]
