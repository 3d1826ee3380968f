"""What one cache has read, folded by other plans."""

import pytest
import torch

import fakes
from kvfold.errors import CacheError
from kvfold.memory.forward import Boundaries
from kvfold.open import cache, cache_with, fork_under
from kvfold.plan import Plan


def read(model, *, for_plans=(), tokens=40):
    past = cache_with(
        model, "full", boundaries=Boundaries(prompt=0), least=0, for_plans=[Plan.parse(one) for one in for_plans]
    )
    if tokens:
        model(torch.arange(tokens)[None] + 5, past_key_values=past)
    return past


@pytest.fixture
def model():
    """A model that lives as long as the caches do."""
    return fakes.fresh("llama")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # the second has sliding layers, which never fold
def test_a_fork_goes_on_as_a_cache_that_read_under_its_plan(name):
    model = fakes.fresh(name)
    plans = ["snapkv(tokens=12)", "h2o(tokens=12) + int8"]
    shared = read(model, for_plans=plans)
    for plan in plans:
        fork = fork_under(shared, plan)
        own = cache(model, plan, prompt_tokens=0, least=0)
        model(torch.arange(40)[None] + 5, past_key_values=own)
        logits = []
        for past in (fork, own):
            past.fold()
            logits.append(model(torch.tensor([[3, 4]]), past_key_values=past).logits)
        assert logits[0].equal(logits[1])
        assert fork.ledger().stored_bytes == own.ledger().stored_bytes
    assert shared.ledger().seen == 40


def test_a_plan_for_which_nothing_was_recorded_says_what_is_missing(model):
    past = read(model)
    with pytest.raises(CacheError, match="it needs window, which was not recorded"):
        fork_under(past, "snapkv(tokens=12)")
    with pytest.raises(CacheError, match="it needs token_ids"):
        fork_under(past, "kvzip(tokens=12)")


def test_what_was_folded_is_not_folded_by_another_plan(model):
    past = read(model, for_plans=["snapkv(tokens=12)"])
    fork = fork_under(past, "snapkv(tokens=12)")
    fork.fold()
    with pytest.raises(CacheError, match="folded already"):
        fork_under(fork, "streaming_llm(tokens=8)")


def test_a_plan_that_places_slots_reads_by_itself(model):
    past = read(model)
    with pytest.raises(CacheError, match="a plan that places slots reads by itself"):
        fork_under(past, "sentkv(budget=0.5)")


def test_a_cache_that_read_nothing_can_be_forked_too(model):
    fork = fork_under(read(model, tokens=0), "snapkv(tokens=12)")
    model(torch.arange(40)[None] + 5, past_key_values=fork)
    fork.fold()
    assert fork.ledger().slots == 12 * fork.ledger().layers * fork.ledger().kv_heads
