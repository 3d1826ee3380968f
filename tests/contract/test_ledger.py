"""Contract 6: the ledger's bytes are those of the distinct storages found by walking the cache, exactly."""

import pytest
import torch

import kvfold
from driving import feed, kept, storages
from fakes import fresh, model_of, text
from kvfold.plan import Plan
from plans import TOKENS, Uneven, lossy, mostly, pairs

LOSSY = {**lossy(), "uneven": Plan(select=Uneven(tokens=TOKENS)), **pairs()}


def agrees(cache):
    """Whether ledger and walker say the same, in sum and part by part."""
    ledger = cache.ledger()
    slots = sum(len(head) for layer in kept(cache).values() for row in layer for head in row)
    return (
        sum(storages(cache).values()) == ledger.stored_bytes + ledger.other_bytes
        and ledger.stored_bytes == sum(part.stored_bytes for part in ledger.parts)
        and ledger.resident_bytes == sum(part.stored_bytes for part in ledger.parts if part.device == "cpu")
        and ledger.slots == slots
        and (ledger.attended_slots == slots or ledger.traffic is not None)
        and ledger.slack_bytes == sum(part.slack_bytes for part in ledger.parts)
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", mostly(LOSSY))
def test_bytes_are_those_of_the_tensors_at_every_moment(family, name):
    model = model_of(family)
    cache = kvfold.cache(model, LOSSY[name], stride=8, least=0)
    assert cache.ledger().stored_bytes == 0
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :5] = 0
    ids, at = text(2, 60), 0
    for size in (20, 1, 3, 9, 20):
        feed(model, ids[:, at : at + size], cache, mask=mask[:, : at + size])
        at += size
        assert agrees(cache)
    assert agrees(cache.fork())
    cache.fold()
    assert agrees(cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert agrees(cache)
    assert cache.ledger().seen == 53
    assert cache.ledger().fed == 53


def test_full_bytes_are_what_every_real_token_would_take():
    model = model_of("llama")
    cache = kvfold.cache(model, "none", least=0)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    feed(model, text(2, 20), cache, mask=mask)
    ledger = cache.ledger()
    assert ledger.full_bytes == 35 * 3 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, size, float32
    assert (ledger.slots, ledger.seen, ledger.fed) == (8 * 3 * 2, 35, 20)


def test_slack_is_what_the_buffers_hold_beyond_their_tokens():
    cache = kvfold.cache(model_of("llama"), "full")
    feed(model_of("llama"), text(1, 40), cache)
    ledger = cache.ledger()
    assert ledger.slack_bytes == 5 * 3 * (2 * 2 * 8 * 4 + 4)  # an eighth of 40; a position takes 4 bytes
    assert ledger.stored_bytes == 45 * 3 * (2 * 2 * 8 * 4 + 4)


@pytest.mark.parametrize("keep", [0.5, 0.2])
@pytest.mark.parametrize("method", ["streaming_llm", "h2o", "snapkv"])
def test_the_kept_fraction_is_the_nominal_one_after_a_fold(method, keep):
    """At 1,000 tokens and a head of 64: at most 0.02 above and 0.01 below, everything included."""
    model = fresh("llama", head_dim=64, num_hidden_layers=2, max_position_embeddings=2048).bfloat16()
    cache = kvfold.cache(model, f"{method}(keep={keep})", prompt_tokens=0, least=0)
    feed(model, text(1, 1000), cache)
    cache.fold()
    assert keep - 0.01 <= cache.ledger().stored <= keep + 0.02
    assert sum(storages(cache).values()) == cache.ledger().stored_bytes


@pytest.mark.parametrize("method", ["streaming_llm", "h2o", "snapkv"])
def test_a_budget_in_bytes_is_met(method):
    cache = kvfold.cache(model_of("llama"), f"{method}(max_bytes=20000)", prompt_tokens=0)
    feed(model_of("llama"), text(2, 60), cache)
    cache.fold()
    assert 0.9 * 20000 <= cache.ledger().stored_bytes <= 20000


def test_quantised_slots_take_their_codes_and_scales():
    cache = kvfold.cache(model_of("llama"), "int8", prompt_tokens=0, pinned=0)
    feed(model_of("llama"), text(1, 50), cache)
    cache.fold()
    a_slot = 2 * (8 + 2) + 4  # keys and values: a byte a number, float16 a group; and a position
    assert cache.ledger().stored_bytes == 50 * 3 * 2 * a_slot
    packed = kvfold.cache(model_of("llama"), "int4", prompt_tokens=0, pinned=0)
    feed(model_of("llama"), text(1, 50), packed)
    packed.fold()
    assert packed.ledger().stored_bytes == 50 * 3 * 2 * (2 * (4 + 4) + 4)
