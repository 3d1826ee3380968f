"""Contract 5, 8, 9 and 10: forks, copies, marks and crops; what a turn feeds; what leaks; what an interrupt leaves."""

# pyright: reportCallIssue=false

import copy
import gc
import weakref
from functools import cache as once

import pytest
import torch

import kvfold
from driving import close, feed, kept
from fakes import model_of, text
from kvfold.errors import BudgetError, CacheError
from kvfold.hf import snapshot
from kvfold.memory.attention_sums import AttentionSums
from kvfold.plan import Plan
from plans import TOKENS, Uneven, lossy, mostly, pairs

LOSSY = {**lossy(), "uneven": Plan(select=Uneven(tokens=TOKENS)), **pairs()}
FEW = ["streaming_llm", "h2o", "snapkv", "int8", "uneven"]
DROPPING = [name for name, plan in LOSSY.items() if plan.has_budget]


def begun(plan, family="llama", *, rows=1, **settings):
    """A cache after a prompt, a fold by stride and some raw tokens."""
    model = model_of(family)
    cache = kvfold.cache(model, plan, **{"stride": 8, "least": 0, **settings})
    feed(model, text(rows, 33), cache, sizes=(20,))
    return model, cache


def told(cache):
    """What a cache holds, says to ten tokens more, and holds then."""
    model, before = model_of("llama" if len(cache.layers) == 3 else "gemma3"), kept(cache)
    logits = feed(model, text(len(cache.memory.seen), 10, seed=77), cache, sizes=(1,))
    return before, logits, kept(cache)


@once
def untouched(family, name, rows=1):
    """What a cache tells to which nothing happened after it began."""
    return told(begun(LOSSY[name], family, rows=rows)[1])


def same(cache, wanted):
    """Whether a cache holds and says what another one, or an earlier answer, does."""
    before, logits, after = wanted if isinstance(wanted, tuple) else told(wanted)
    found = told(cache)
    return found[0] == before and close(found[1], logits) and found[2] == after


@pytest.mark.parametrize("way", ["fork", "deepcopy", "snapshot"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", mostly(LOSSY))
def test_a_twin_and_its_original_go_two_ways_as_two_separate_runs(family, name, way):
    model, cache = begun(LOSSY[name], family, rows=2)
    if way == "snapshot":
        twin = kvfold.cache(model, LOSSY[name], stride=8, least=0)
        snapshot.put_back(twin, snapshot.take(cache))
    else:
        twin = cache.fork() if way == "fork" else copy.deepcopy(cache)
    feed(model, text(2, 9, seed=5), twin, sizes=(3,))
    assert same(cache, untouched(family, name, 2))
    assert same(twin, gone_on(family, name))


@once
def gone_on(family, name):
    """What a cache of two rows tells after nine tokens more."""
    model, cache = begun(LOSSY[name], family, rows=2)
    feed(model, text(2, 9, seed=5), cache, sizes=(3,))
    return told(cache)


@pytest.mark.parametrize("name", mostly(LOSSY))
def test_a_mark_brings_everything_back(name):
    model, cache = begun(LOSSY[name])
    mark = cache.mark()
    feed(model, text(1, 30, seed=5), cache, sizes=(3, 9, 1))
    cache.fold()
    cache.restore(mark)
    assert same(cache, untouched("llama", name))


def test_a_mark_survives_a_crop_below_it_and_another_mark():
    model, cache = begun("full")
    low = cache.mark()
    feed(model, text(1, 4, seed=1), cache)
    high = cache.mark()
    cache.crop(-9)
    feed(model, text(1, 20, seed=2), cache)
    cache.restore(low)
    feed(model, text(1, 4, seed=3), cache)
    cache.restore(high)
    wanted = begun("full")[1]
    feed(model, text(1, 4, seed=1), wanted)
    assert same(cache, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", mostly(name for name in LOSSY if AttentionSums() not in LOSSY[name].select.records))
def test_crop_inside_the_raw_tail_and_redo_is_the_same(family, name):
    model, cache = begun(LOSSY[name], family, stride=None)
    cache.activate_past_recording()
    wanted = begun(LOSSY[name], family, stride=None)[1]
    again = text(1, 7, seed=5)
    feed(model, again, cache)
    cache.crop(-3)
    feed(model, torch.cat([again[:, 4:6], text(1, 2)], dim=1), cache)
    cache.crop(-2)
    feed(model, again[:, 6:], cache)
    feed(model, again, wanted, sizes=(4, 2))
    assert cache.memory.fed == wanted.memory.fed
    assert close(feed(model, text(1, 3), cache), feed(model, text(1, 3), wanted))


def test_crop_refuses_what_it_cannot_take_back():
    cache = begun("streaming_llm(tokens=14)")[1]
    with pytest.raises(CacheError, match="only the newest 5 are still raw"):
        cache.crop(-6)
    with pytest.raises(CacheError, match=r"give crop\(-3\)"):
        cache.crop(3)
    cache.crop(0)
    cache.crop(-5)
    with pytest.raises(CacheError, match="already added up"):
        begun("h2o(tokens=14)")[1].crop(-1)
    sliding = begun("full", "gemma3")[1]
    before = kept(sliding)
    with pytest.raises(CacheError, match="activate_past_recording"):
        sliding.crop(-3)
    assert kept(sliding) == before
    assert same(sliding, begun("full", "gemma3")[1])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", FEW)
def test_reset_forgets_everything_even_where_the_prompt_ended(family, name):
    model, cache = begun(LOSSY[name], family, rows=2)
    cache.reset()
    assert cache.memory.fed == 0
    assert cache.ledger().stored_bytes == 0
    feed(model, text(1, 33), cache, sizes=(20,))
    assert same(cache, untouched(family, name))


@pytest.mark.parametrize("name", FEW)
def test_a_fork_that_is_reset_forgets_everything_too(name):
    model, cache = begun(LOSSY[name], rows=2)
    before, twin = kept(cache), cache.fork()
    twin.reset()
    assert (twin.memory.fed, twin.ledger().stored_bytes) == (0, 0)
    feed(model, text(1, 33), twin, sizes=(20,))
    assert same(twin, untouched("llama", name))
    assert kept(cache) == before


def test_a_fork_that_goes_on_lets_go_of_the_buffers_that_it_began_with():
    model, cache = begun("full")
    twin = cache.fork()
    began = [weakref.ref(layer.state.tail.keys) for layer in twin.memory.layers.values()]
    assert all(one() is not None for one in began)
    feed(model, text(1, 200, seed=3), twin)
    gc.collect()
    assert not [one for one in began if one() is not None]


@pytest.mark.parametrize("name", mostly(LOSSY))
def test_rows_taken_and_reordered_are_those_rows(name):
    _, cache = begun(LOSSY[name], rows=3)
    held, twin = kept(cache), cache.fork()
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert all(rows == [held[layer][2], held[layer][0]] for layer, rows in kept(cache).items())
    twin.reorder_cache(torch.tensor([2, 0, 0]))
    twin.batch_select_indices(torch.tensor([0]))
    cache.batch_select_indices(torch.tensor([True, False]))
    assert same(cache, twin)


@pytest.mark.parametrize("name", ["full", "streaming_llm", "h2o", "snapkv", "int8", "h2o-turn"])
def test_a_turn_feeds_only_its_own_tokens_and_the_last_of_the_reply(name):
    model, counted = model_of("llama"), []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, args, out: counted.append(args[0].shape[1]))
    try:
        cache, said = kvfold.cache(model, LOSSY[name], prompt_tokens=0, least=0), text(1, 20)
        for turn in range(4):
            counted.clear()
            said = torch.cat([said, text(1, 5, seed=turn)], dim=1)
            fed = cache.memory.fed
            settings = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
            said = model.generate(said, attention_mask=torch.ones_like(said), past_key_values=cache, **settings)
            cache.fold()
            assert sum(counted) == cache.memory.fed - fed
            assert counted == ([25] if turn == 0 else [6]) + [1] * 5
    finally:
        hook.remove()


def test_a_token_that_was_dropped_changes_nothing_later():
    model, ids = model_of("llama"), text(1, 20)
    changed = ids.clone()
    changed[0, 9] = 50 if ids[0, 9] != 50 else 51
    found = []
    for prompt in (ids, changed):
        cache = kvfold.cache(model, "none", least=0)
        feed(model, prompt, cache)
        found.append(feed(model, text(1, 8, seed=1), cache))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("plan", ["streaming_llm(tokens=14)", "int8"])
def test_a_token_that_was_kept_or_seen_while_raw_changes_what_follows(plan):
    model, ids = model_of("llama"), text(1, 20)
    changed = ids.clone()
    changed[0, 9] = 50 if ids[0, 9] != 50 else 51
    found = []
    for prompt in (ids, changed):
        cache = kvfold.cache(model, plan, least=0)
        feed(model, prompt, cache)
        found.append(feed(model, text(1, 8, seed=1), cache))
    assert not close(found[0], found[1])


class Stopped(BaseException):
    """An interrupt, as Ctrl-C is one: no Exception."""


def stops(module, args):
    raise Stopped


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("family", "name"), [*(("llama", name) for name in [*FEW, "full"]), ("gemma3", "snapkv")])
def test_an_interrupt_before_any_layer_leaves_the_cache_as_it_was(family, name, fold, layer):
    model, cache = begun(LOSSY[name], family)
    decoder = getattr(model.model, "language_model", model.model).layers[layer]
    hook = decoder.register_forward_pre_hook(stops)
    try:
        with pytest.raises(Stopped):
            feed(model, text(1, 9 if fold else 2, seed=5), cache)
    finally:
        hook.remove()
    assert same(cache, untouched(family, name))


def test_an_interrupt_after_the_last_attention_leaves_the_tokens_in():
    model, cache = begun("snapkv(tokens=14)")
    hook = model.model.norm.register_forward_pre_hook(stops)
    try:
        with pytest.raises(Stopped):
            feed(model, text(1, 2, seed=5), cache)
    finally:
        hook.remove()
    wanted = begun("snapkv(tokens=14)")[1]
    feed(model, text(1, 2, seed=5), wanted)
    assert same(cache, wanted)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "snapkv", "uneven"])
def test_an_interrupt_inside_a_method_during_a_forward_undoes_the_forward(monkeypatch, name, at):
    model, cache = begun(LOSSY[name])
    _stop_at(monkeypatch, type(LOSSY[name].select), at)
    with pytest.raises(Stopped):
        feed(model, text(1, 9, seed=5), cache)
    monkeypatch.undo()
    assert same(cache, untouched("llama", name))


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "snapkv", "uneven"])
def test_an_interrupted_fold_ends_later_with_the_rows_it_was_given(monkeypatch, name, at):
    model, cache = begun(LOSSY[name], rows=2, stride=None, prompt_tokens=0)
    wanted = cache.fork()
    mark, before = cache.mark(), cache.fork()
    valid = torch.ones(2, 33, dtype=torch.bool)
    valid[0, 30:] = False
    wanted.fold(valid)
    _stop_at(monkeypatch, type(LOSSY[name].select), at)
    with pytest.raises(Stopped):
        cache.fold(valid)
    monkeypatch.undo()
    broken = cache.fork()
    mask = torch.cat([valid, torch.ones(2, 4, dtype=torch.bool)], dim=1).long()
    found = [feed(model, text(2, 4, seed=5), one, mask=mask) for one in (cache, broken, wanted)]
    assert close(found[0], found[2])
    assert close(found[1], found[2])
    assert kept(cache) == kept(wanted)
    cache.restore(mark)
    assert same(cache, before)


def _stop_at(monkeypatch, kind, at):
    """Let the `at`-th choice of a method be interrupted."""
    calls, choose_slots = [0], kind.choose_slots

    def stopping(self, candidates):
        calls[0] += 1
        if calls[0] > at:
            raise Stopped
        return choose_slots(self, candidates)

    monkeypatch.setattr(kind, "choose_slots", stopping)


@pytest.mark.parametrize("scope", ["history", "turn"])
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "snapkv", "uneven"])
def test_a_lowered_budget_evicts_and_the_next_folds_go_on(name, scope):
    plan = LOSSY[name].with_budget(tokens=24).with_scope(scope)
    model, cache = begun(plan, stride=None)
    feed(model, text(1, 6, seed=3), cache)
    cache.rebudget(tokens=12)
    most = max(len(head) for layer in kept(cache).values() for head in layer[0])
    assert most <= 12 + 19
    cache.fold()
    assert all(len(head) <= 12 for layer in kept(cache).values() for head in layer[0])
    cache.rebudget(keep=0.9)
    feed(model, text(1, 20, seed=4), cache)
    cache.fold()
    assert max(len(head) for layer in kept(cache).values() for head in layer[0]) > 12
    assert all(set(range(4)) <= set(head) for layer in kept(cache).values() for head in layer[0])


def test_a_budget_that_cannot_be_met_changes_nothing():
    _, cache = begun("streaming_llm(tokens=14)")
    with pytest.raises(BudgetError, match="give tokens=5 or more"):
        cache.rebudget(tokens=2)
    with pytest.raises(BudgetError, match="give max_bytes="):
        cache.rebudget(max_bytes=10)
    assert str(cache.plan) == "streaming_llm(tokens=14)" == cache.ledger().plan
    assert same(cache, begun("streaming_llm(tokens=14)")[1])
    with pytest.raises(BudgetError, match="has none to change"):
        begun("full")[1].rebudget(keep=0.5)
