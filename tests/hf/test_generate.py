"""`model.generate(past_key_values=cache)` in all its ways, on every family: the same tokens as the stock cache gives
where nothing is dropped, and the oracle's where something is.
"""

# pyright: reportOptionalMemberAccess=false

import pytest
import torch
from transformers import DynamicCache

import fakes
import kvfold
from driving import close, exact, feed, kept
from fakes import FAMILIES, model_of, text
from kvfold.errors import CacheError

SETTINGS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
REPETITIVE = text(1, 8).repeat(1, 5)

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams_several": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "chunked": {"prefill_chunk_size": 7},
    "lookup": {"prompt_lookup_num_tokens": 4},
}


def stock(model):
    return DynamicCache(config=model.config.get_text_config())


def generate(model, ids, cache, *, mask=None, **settings):
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **{**SETTINGS, **settings})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_plan_says_what_the_stock_cache_says(family, way):
    model = model_of(family)
    wanted = generate(model, REPETITIVE, stock(model), **WAYS[way])
    cache = kvfold.cache(model, "full")
    assert torch.equal(generate(model, REPETITIVE, cache, **WAYS[way]), wanted)
    assert cache.memory.fed == wanted.shape[1] - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_cache_goes_on_working_on_the_same_model(family):
    model = fakes.fresh(family)
    wanted = [generate(model, REPETITIVE, stock(model), **way) for way in WAYS.values()]
    kvfold.cache(model, "snapkv(keep=0.5)")
    found = [generate(model, REPETITIVE, stock(model), **way) for way in WAYS.values()]
    without = generate(model, REPETITIVE, None)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert torch.equal(without, wanted[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_cache_under_our_name_honours_left_padding(family):
    model = model_of(family)
    kvfold.cache(model, "full")
    ids, mask = padded([text(1, 20, seed=3), text(1, 12, seed=4)])
    batch = generate(model, ids, stock(model), mask=mask)
    alone = generate(model, text(1, 12, seed=4), stock(model))
    assert torch.equal(batch[1, -8:], alone[0, -8:])


def padded(rows):
    """Rows of different length, pads on the left, and their mask."""
    longest = max(row.shape[1] for row in rows)
    ids = [torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows]
    mask = [torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows]
    return torch.cat(ids), torch.cat(mask)


PLANS = ["full", "none", "streaming_llm(tokens=14)", "h2o(tokens=14)", "snapkv(tokens=14, window=5)", "int8"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_its_rows_one_by_one(family, plan):
    model = model_of(family)
    rows = [text(1, 30, seed=1), text(1, 9, seed=2), text(1, 22, seed=3)]
    ids, mask = padded(rows)
    cache = kvfold.cache(model, plan, stride=5, least=0)
    batch = generate(model, ids, cache, mask=mask, max_new_tokens=12)
    together = kept(cache)
    for index, row in enumerate(rows):
        own = kvfold.cache(model, plan, stride=5, least=0)
        alone = generate(model, row, own, max_new_tokens=12)
        assert torch.equal(batch[index, -12:], alone[0, -12:])
        assert all(together[layer][index] == held[0] for layer, held in kept(own).items())


@pytest.mark.parametrize("plan", PLANS)
def test_a_later_turn_takes_full_ids_or_new_ids_with_the_full_mask(plan):
    model, first, second, third = model_of("llama"), text(1, 20), text(1, 6, seed=1), text(1, 5, seed=2)

    def turns(feeds_full_ids):
        cache, said, answers = kvfold.cache(model, plan, stride=8, least=0), torch.empty(1, 0, dtype=torch.long), []
        for turn in (first, second, third):
            whole = torch.cat([said, turn], dim=1)
            new = whole if feeds_full_ids else whole[:, cache.memory.fed :]
            answer = generate(model, new, cache, mask=torch.ones_like(whole))[:, new.shape[1] :]
            said = torch.cat([whole, answer], dim=1)
            answers.append(answer)
        return torch.cat(answers, dim=1), kept(cache)

    full, held = turns(True)
    new, held_too = turns(False)
    assert torch.equal(full, new)
    assert held == held_too


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_generate_equal_one_pass_over_everything(family):
    model = model_of(family)
    cache = kvfold.cache(model, "full")
    said = text(1, 20)
    for seed in (1, 2):
        said = torch.cat([generate(model, said, cache), text(1, 5, seed=seed)], dim=1)
    found = feed(model, said[:, cache.memory.fed :], cache)
    assert close(found, exact(family, said)[:, -found.shape[1] :])


@pytest.mark.parametrize("plan", ["full", "streaming_llm(tokens=14)", "snapkv(tokens=14, window=5)", "int8", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prompt_lookup_says_what_greedy_says(family, plan):
    model = model_of(family)
    settings = {"max_new_tokens": 30, "prompt_lookup_num_tokens": 4}
    cache = kvfold.cache(model, plan, prompt_tokens=REPETITIVE.shape[1], stride=8, least=0)
    found = generate(model, REPETITIVE, cache, **settings)
    logits = feed(model, text(1, 3), cache)
    assert logits.isfinite().all()
    assert found.shape[1] == REPETITIVE.shape[1] + 30
    if plan in ("full",):
        assert torch.equal(found, generate(model, REPETITIVE, stock(model), max_new_tokens=30))


@pytest.mark.parametrize("plan", ["streaming_llm(tokens=14)", "snapkv(tokens=14, window=5)", "int8", "none"])
def test_after_prompt_lookup_folds_catch_up(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, stride=8, least=0)
    generate(model, REPETITIVE, cache, max_new_tokens=30, prompt_lookup_num_tokens=4)
    feed(model, text(1, 1), cache)
    feed(model, text(1, 1), cache)
    held = max(len(head) for layer in kept(cache).values() for head in layer[0])
    assert held <= (4 if plan == "none" else 14) + 8 or plan == "int8"
    tails = [layer.state.tail for layer in cache.memory.layers.values()]
    assert all(tail is not None and tail.length <= 8 for tail in tails)


@pytest.mark.parametrize("plan", PLANS)
def test_beams_on_an_empty_cache_leave_a_branched_one(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, stride=5, least=0)
    generate(model, text(1, 20), cache, num_beams=3, max_new_tokens=12)
    assert cache.batch_size == 3
    with pytest.raises(CacheError, match="keep one of them by batch_select_indices"):
        feed(model, text(3, 2), cache)
    cache.batch_select_indices(torch.tensor([0]))
    assert feed(model, text(1, 2), cache).isfinite().all()


@pytest.mark.parametrize("plan", PLANS)
def test_beams_on_a_past_repeat_it(plan):
    model, history, turn = model_of("llama"), text(1, 20), text(1, 4, seed=1)
    cache = kvfold.cache(model, plan, stride=None, least=0)
    feed(model, history, cache)
    before = kept(cache)
    twin = cache.fork()
    whole = torch.cat([history, turn], dim=1)
    found = generate(model, whole, cache, num_beams=3)
    assert cache.batch_size == 3
    wide = fakes.model_of("llama")
    twin.batch_repeat_interleave(3)
    assert all(rows == before[layer] * 3 for layer, rows in kept(twin).items())
    assert found.shape == (1, 32)
    if plan == "full":
        assert torch.equal(found, generate(wide, whole, stock(model), num_beams=3))


def test_rows_that_do_not_match_the_cache_are_refused():
    model = model_of("llama")
    cache = kvfold.cache(model, "full")
    feed(model, text(2, 6), cache)
    with pytest.raises(CacheError, match="3 rows were fed; the cache holds 2"):
        feed(model, text(3, 2), cache)
    assert feed(model, text(2, 2), cache).isfinite().all()


@pytest.mark.parametrize("plan", PLANS)
def test_decoding_never_holds_more_than_the_budget_and_a_stride(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, stride=6, least=0)
    most = {"full": 10**9, "int8": 10**9, "none": 4}.get(plan, 14) + 6
    feed(model, text(1, 40), cache)
    for step in range(25):
        feed(model, text(1, 1, seed=step), cache)
        assert all(len(head) <= most for layer in kept(cache).values() for head in layer[0])


def test_rows_that_end_early_do_not_keep_their_pads():
    """generate() appends pads whose mask is 1; fold(valid=...) and the later mask take them back."""
    model = model_of("llama")
    rows = [text(1, 20, seed=1), text(1, 20, seed=2)]
    ids = torch.cat(rows)
    cache = kvfold.cache(model, "snapkv(tokens=14, window=5)", prompt_tokens=0)
    said = generate(model, ids, cache)[:, : cache.memory.fed]
    valid = torch.ones_like(said, dtype=torch.bool)
    valid[0, -5:] = False  # as if row 0 had ended five columns ago
    cache.fold(valid)
    own = kvfold.cache(model, "snapkv(tokens=14, window=5)", prompt_tokens=0)
    feed(model, said[:1, :-5], own)
    own.fold()
    mask = torch.cat([valid, torch.ones(2, 4, dtype=torch.bool)], dim=1).long()
    turn = text(2, 4, seed=5)
    together = feed(model, turn, cache, mask=mask)
    assert max(max(head) for layer in kept(cache).values() for head in layer[0]) == said.shape[1] - 5 + 3
    assert all(len(head) <= 14 + 4 for layer in kept(cache).values() for row in layer for head in row)
    assert together.isfinite().all()
    assert cache.memory.seen == (said.shape[1] - 5 + 4, said.shape[1] + 4)


@pytest.mark.parametrize("plan", ["streaming_llm(tokens=14)", "h2o(tokens=14)", "full", "int8"])
def test_pads_taken_back_by_a_later_mask_are_as_if_never_fed(plan):
    model, ids, turn = model_of("llama"), text(1, 20), text(1, 4, seed=5)
    cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
    feed(model, torch.cat([ids, text(1, 5, seed=9)], dim=1), cache)  # five columns that turn out to be pads
    mask = torch.ones(1, 29, dtype=torch.long)
    mask[:, 20:25] = 0
    found = feed(model, turn, cache, mask=mask)
    own = kvfold.cache(model, plan, prompt_tokens=0, least=0)
    feed(model, ids, own)
    assert close(found, feed(model, turn, own))
    assert kept(cache) == kept(own)
