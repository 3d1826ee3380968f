"""What transformers may do to a cache besides generating: masks, other models, other attention, limits, threads.

Each test is one point of the design's list of what the one door to transformers must hold.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import fakes
import kvfold
from driving import close, exact, feed, kept, positions_of
from fakes import POSITIONS, exact_twin, fresh, model_of, text
from kvfold.errors import BudgetError, CacheError, ModelError, PlanError


def test_another_model_is_refused():
    cache = kvfold.cache(model_of("llama"), "full")
    with pytest.raises(CacheError, match="it was not made for"):
        feed(model_of("qwen2"), text(1, 3), cache)
    others = kvfold.cache(model_of("qwen2"), "full")
    with pytest.raises(CacheError, match="used with another model"):
        feed(model_of("qwen2"), text(1, 3), cache)
    assert (cache.memory.fed, others.memory.fed) == (0, 0)


def test_a_copy_of_the_model_is_another_model():
    cache = kvfold.cache(model_of("llama"), "full")
    with pytest.raises(CacheError, match="used with another model"):
        feed(copy.deepcopy(model_of("llama")), text(1, 3), cache)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_another_attention_function_fails_with_the_mend(name):
    model = fresh("llama")
    cache = kvfold.cache(model, "full")
    model.set_attn_implementation(name)
    with pytest.raises(CacheError, match=r"make a new one by kvfold.cache\(model, ...\)"):
        feed(model, text(1, 3), cache)
    cache = kvfold.cache(model, "full")
    assert close(feed(model, text(1, 6), cache), exact("llama", text(1, 6)))


def test_a_mask_of_four_dimensions_is_refused_for_a_folded_cache_only():
    model, ids = model_of("llama"), text(1, 6)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(CacheError, match="give a mask of two dimensions"):
        model(ids, attention_mask=mask, past_key_values=kvfold.cache(model, "full"))
    stock = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
    assert close(stock, exact("llama", ids))


def test_a_mask_of_the_wrong_width_says_which():
    model = model_of("llama")
    cache = kvfold.cache(model, "full")
    feed(model, text(2, 6), cache)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(CacheError, match="6 were fed and 3 are new; give one of 9 columns"):
        model(text(2, 3), attention_mask=mask, past_key_values=cache)


def test_a_mask_that_contradicts_what_is_folded_is_refused():
    model = model_of("llama")
    cache = kvfold.cache(model, "streaming_llm(tokens=10)")
    feed(model, text(2, 20), cache)
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[0, 18:20] = 0  # folded as tokens
    with pytest.raises(CacheError, match="give the whole mask"):
        feed(model, text(2, 2), cache, mask=mask)
    ragged = kvfold.cache(model, "full")
    mask[0, :] = 1
    mask[0, :4] = 0
    feed(model, text(2, 20), ragged, mask=mask[:, :20])
    with pytest.raises(CacheError, match="no mask: all are real"):
        feed(model, text(2, 2), ragged)
    assert feed(model, text(2, 2), ragged, mask=mask).isfinite().all()


def test_dropout_and_other_patterns_are_refused():
    model = fresh("llama", attention_dropout=0.2)
    cache = kvfold.cache(model, "full")
    model.train()
    with pytest.raises(CacheError, match=r"model\.eval"):
        feed(model, text(1, 3), cache)


def test_a_model_whose_layers_all_slide_is_refused_at_once():
    sizes = {**fakes._SIZES, "sliding_window": 8}
    with pytest.raises(ModelError, match="none of its 3 layers attends to the whole text"):
        kvfold.cache(MistralForCausalLM(MistralConfig(**sizes)), "full")


def test_unknown_arguments_of_attention_are_errors():
    model = model_of("llama")
    cache = kvfold.cache(model, "full")
    with pytest.raises(CacheError, match="position_bias"), torch.no_grad():
        model(text(1, 3), past_key_values=cache, position_bias=torch.zeros(1))


@pytest.mark.parametrize("plan", ["full", "streaming_llm(tokens=12)"])
def test_positions_that_the_model_does_not_have_are_refused(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, least=0)
    feed(model, text(1, POSITIONS - 2), cache)
    before = kept(cache)
    with pytest.raises(ModelError, match=f"at position {POSITIONS}; .* folding saves memory, not positions"):
        feed(model, text(1, 3), cache)
    cache.ledger()
    assert kept(cache) == before
    assert feed(model, text(1, 2), cache).isfinite().all()


def test_phi3_is_refused_before_its_original_window_ends():
    model = fresh("phi3", original_max_position_embeddings=20)
    cache = kvfold.cache(model, "full")
    feed(model, text(1, 15), cache)
    with pytest.raises(ModelError, match="stay below 20 tokens"):
        feed(model, text(1, 5), cache)
    assert feed(model, text(1, 4), cache).isfinite().all()


def test_phi3_that_would_drop_the_cache_in_a_later_turn_is_noticed():
    model = fresh("phi3", original_max_position_embeddings=20)
    cache = kvfold.cache(model, "full")
    feed(model, text(1, 10), cache)
    with pytest.raises(ModelError, match="transformers dropped the cache there"):
        model.generate(text(1, 25), past_key_values=cache, max_new_tokens=2, eos_token_id=None)
    without = model.generate(text(1, 25), max_new_tokens=2, eos_token_id=None)
    assert without.shape == (1, 27)


@pytest.mark.parametrize("plan", ["full", "h2o(tokens=12)", "snapkv(tokens=12, window=4) + int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_two_caches_in_two_threads_on_one_model(family, plan):
    model = model_of(family)
    texts = [text(1, 60, seed=seed) for seed in (1, 2)]
    sizes = (20, *[1] * 40)
    wanted = [feed(model, ids, kvfold.cache(model, plan, stride=7, least=0), sizes=sizes) for ids in texts]
    caches = [kvfold.cache(model, plan, stride=7, least=0) for _ in texts]
    found: list[torch.Tensor | None] = [None, None]

    def run(index):
        found[index] = feed(model, texts[index], caches[index], sizes=sizes)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("plan", ["full", "h2o(tokens=12)", "snapkv(tokens=12, window=4)", "int8"])
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cache_goes_on_outside_the_mode_it_was_filled_in(first, plan):
    # In float64, for in float32 the ways differ enough to carry a value over a codec's rounding edge.
    model, ids = exact_twin("llama") if plan == "int8" else model_of("llama"), text(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = 0
    own = kvfold.cache(model, plan, stride=8, least=0)
    wanted = feed(model, ids, own, mask=mask, sizes=(12, 6, 1, 1))
    cache = kvfold.cache(model, plan, stride=8, least=0)
    with first():
        found = [_bare(model, ids, cache, mask, 0, 12)]
        cache = cache.fork()
        cache.batch_select_indices(torch.tensor([0, 1]))
    for start, stop, mode in ((12, 18, torch.no_grad), (18, 19, torch.inference_mode), (19, 20, torch.no_grad)):
        with mode():
            found.append(_bare(model, ids, cache, mask, start, stop))
    with torch.enable_grad():
        found.append(_bare(model, ids, cache, mask, 20, 30))
    answer = torch.cat([one.detach() for one in found], dim=1)
    assert close(answer[mask.bool()], wanted[mask.bool()])


def _bare(model, ids, cache, mask, start, stop):
    mask = mask[:, :stop]
    positions = positions_of(mask)[:, start:]
    return model(ids[:, start:stop], attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def test_gradients_through_a_folded_cache_are_those_of_stock_attention():
    model, ids = fresh("llama"), text(1, 12)
    kvfold.cache(model, "full")
    found = []
    for cache in (kvfold.cache(model, "full"), DynamicCache(config=model.config)):
        model.zero_grad()
        model(ids, past_key_values=cache).logits.square().sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4


@pytest.mark.parametrize("family", ["gemma3", "gemma3_conditional"])
def test_sliding_layers_stay_stock_and_hold_no_long_storage(family):
    model = model_of(family)
    cache = kvfold.cache(model, "none", least=0)
    feed(model, text(1, 300), cache)
    stock = [layer for index, layer in enumerate(cache.layers) if index not in cache.memory.layers]
    assert all(layer.is_sliding for layer in stock)
    held = sum(layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in stock)
    window = fakes.WINDOW * 2 * 8 * 4  # slots, heads, head size, bytes
    assert held <= 2 * len(stock) * 2 * window


def test_budget_mistakes_are_said_before_any_token():
    model = model_of("llama")
    with pytest.raises(BudgetError, match="give tokens=5 or more"):
        kvfold.cache(model, "snapkv(tokens=3)")
    with pytest.raises(PlanError, match="near it are"):
        kvfold.cache(model, "snapvk(tokens=30)")
    with pytest.raises(BudgetError, match="give max_bytes="):
        feed(model, text(1, 30), kvfold.cache(model, "snapkv(max_bytes=100)"))
