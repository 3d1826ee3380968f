"""The same greedy tokens whatever the way: speculation, chunks of the prompt, a second turn. For every plan.

A fold every few tokens, candidates that are mostly wrong and a prompt that repeats itself bring rejected candidates to
each side of a fold. What is held afterwards is the same too.
"""

import copy
from typing import Any

import pytest
import torch
import transformers

import kvfold
from driving import kept
from fakes import fresh, model_of, text
from kvfold.errors import CacheError
from plans import lossless, lossy, pairs

PLANS = lossless() | lossy() | pairs()
FAMILIES = ("llama", "gemma3", "qwen3")  # the second one slides
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = torch.cat([text(1, 6).repeat(1, 4), text(1, 4, seed=3), text(1, 6).repeat(1, 2)], dim=1)
WAYS = {
    "lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {"assistant_model": None},
    "chunks": {"prefill_chunk_size": 7},
    "chunks of nine": {"prefill_chunk_size": 9},
}

CHUNKS_GO_ON = (5, 21)  # before, transformers reads a later turn from its start again, also into its own caches
RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])


def assistant_of(family):
    """A model that is right now and then."""
    model = fresh(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return model


def generate(model: Any, ids, cache, count, **way):
    """The text and so many tokens behind it. All are real: generate() would take a 0 that the model wrote for a pad."""
    real = torch.ones_like(ids)
    return model.generate(ids, attention_mask=real, past_key_values=cache, max_new_tokens=count, **SETTINGS, **way)


def two_turns(model, plan, **way):
    """The tokens of two replies, and what is held behind them."""
    cache = kvfold.cache(model, plan, stride=8)
    said = PROMPT
    for turn, new in enumerate((20, 8)):
        said = said if turn == 0 else torch.cat([said, text(1, 5, seed=9)], dim=1)
        said = generate(model, said, cache, new, **way)
    return said.tolist(), kept(cache)


def check(family, name, way):
    model = model_of(family)
    settings = WAYS[way] if way != "assistant" else {"assistant_model": assistant_of(family)}
    if "prefill_chunk_size" in settings and RELEASE < CHUNKS_GO_ON:
        with pytest.raises(CacheError, match="leave it out for later turns"):
            two_turns(model, PLANS[name], **settings)
        return
    assert two_turns(model, PLANS[name], **settings) == two_turns(model, PLANS[name])


# Each plan with one family and one way, so that all plans, families and ways are there; the others are the grid.
SHOWN = [(FAMILIES[at % len(FAMILIES)], name, list(WAYS)[at % len(WAYS)]) for at, name in enumerate(PLANS)]


@pytest.mark.parametrize(("family", "name", "way"), SHOWN)
def test_a_plan_says_the_same_in_one_of_the_ways(family, name, way):
    check(family, name, way)


@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_says_the_same_in_every_way(family, name, way):
    check(family, name, way)


PUBLIC = ("snapkv(keep=0.3)", "h2o(keep=0.3)", "chunkkv(keep=0.3)", "sonic(keep=0.3)", "sentkv(budget=0.3)", "int4")


@pytest.mark.parametrize("plan", PUBLIC)
def test_prompt_lookup_changes_no_token_of_the_shipped_model(plan):
    model, tokenizer = kvfold.load("tiny")
    said = "Anna lives in Turin and has a grey cat called Pixel. Anna lives in Turin and has a dog. Anna lives in"
    ids = tokenizer(said * 2, return_tensors="pt").input_ids

    def reply(**way):
        cache = kvfold.cache(model, plan, stride=8, tokenizer=tokenizer)
        return generate(model, ids, cache, 30, **way).tolist()

    assert reply(prompt_lookup_num_tokens=5) == reply()


def test_early_exit_changes_no_token():
    model = fresh("llama")

    def reply(**way):
        cache = kvfold.cache(model, "snapkv(tokens=14, window=5)", stride=8)
        return generate(model, PROMPT, cache, 20, **way).tolist()

    assert reply(assistant_early_exit=1) == reply()


def test_a_forward_behind_a_speculating_generate_is_as_behind_a_plain_one():
    model = model_of("llama")

    def logits(**way):
        cache = kvfold.cache(model, "snapkv(tokens=14, window=5)", stride=8)
        said = generate(model, PROMPT, cache, 12, **way)
        with torch.no_grad():
            turn = model(torch.cat([said[:, -1:], text(1, 11, seed=4)], dim=1), past_key_values=cache)
        return turn.logits, kept(cache)

    (one, held), (other, held_too) = logits(), logits(prompt_lookup_num_tokens=4)
    assert held == held_too
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_what_stands_before_generate_leaves_with_the_last_cache():
    model = fresh("llama")
    before = set(vars(model))
    cache = kvfold.cache(model, "full")
    twin = copy.deepcopy(model)
    assert set(vars(model)) > before
    assert torch.equal(generate(twin, PROMPT, None, 3), generate(model, PROMPT, None, 3))
    del cache
    assert set(vars(model)) == before
