"""A whole text that does not begin with what a cache was fed is refused in one line; the right one goes on."""

from typing import Any

import pytest
import torch

import kvfold
from driving import feed
from fakes import fresh, model_of, text
from kvfold.errors import CacheError

SETTINGS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PLANS = ["full", "snapkv(keep=0.5)", "int8"]
NOT_THE_SAME = "are not those that the cache was fed"


def said(cache, ids, model: Any = None, **settings):
    """What `generate` makes of a whole text."""
    model = model_of("llama") if model is None else model
    return model.generate(ids, past_key_values=cache, **(SETTINGS | settings))


def edited(ids, column=3, row=0):
    """The same text with another token at one place."""
    other = ids.clone()
    other[row, column] = (other[row, column] + 1) % 97
    return other


def refused(cache, ids, *, row=0, **settings):
    with pytest.raises(CacheError, match=NOT_THE_SAME) as error:
        said(cache, ids, **settings)
    assert "\n" not in str(error.value)
    assert f"in row {row} of {len(ids)}" in str(error.value)


def longer(ids, tokens=4):
    return torch.cat([ids, text(len(ids), tokens, seed=9)], dim=1)


@pytest.mark.parametrize("plan", PLANS)
def test_an_edited_history_is_refused_and_the_right_one_goes_on_as_if_nothing_were(plan):
    caches = [kvfold.cache(model_of("llama"), plan, least=0) for _ in range(2)]
    whole = [longer(said(cache, text(1, 20))) for cache in caches].pop()
    for column in (0, 3, 19, 21, 23):  # of the prompt, and of the answer
        refused(caches[0], edited(whole, column))
    refused(caches[0], longer(text(1, 40, seed=5)))  # another prompt altogether
    assert torch.equal(said(caches[0], whole), said(caches[1], whole))


def test_what_stands_behind_what_was_fed_may_be_anything():
    cache = kvfold.cache(model_of("llama"), "full")
    whole = longer(said(cache, text(1, 20)))
    assert cache.memory.fed == 24  # the last token of the answer is not read yet
    said(cache, edited(whole, 24))


def test_a_row_of_a_batch_with_left_padding_is_named():
    model, ids = model_of("llama"), text(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = kvfold.cache(model, "snapkv(keep=0.5)", least=0)
    whole = longer(said(cache, ids, attention_mask=mask))
    wide = torch.cat([mask, torch.ones(3, whole.shape[1] - 12, dtype=mask.dtype)], dim=1)
    refused(cache, edited(whole, 6, row=2), row=2, attention_mask=wide)
    refused(cache, edited(whole, 15, row=1), row=1, attention_mask=wide)
    said(cache, whole, attention_mask=wide)


def test_forwards_of_a_caller_are_known_too_and_those_of_embeddings_are_not():
    model, ids = model_of("llama"), text(1, 30)
    cache = kvfold.cache(model, "full")
    feed(model, ids[:, :10], cache)
    feed(model, ids[:, 10:11], cache)
    refused(cache, edited(ids, 10))
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids[:, 11:20])
        model(inputs_embeds=embedded, past_key_values=cache)
    feed(model, ids[:, 20:25], cache)
    refused(cache, edited(ids, 10))
    said(cache, edited(ids, 12))  # nobody said which ids these were


@pytest.mark.parametrize("plan", PLANS)
def test_prompt_lookup_leaves_no_candidate_in_what_is_known(plan):
    model = fresh("llama", layers=2)
    ids = text(1, 12).repeat(1, 4)
    cache = kvfold.cache(model, plan, least=0)
    whole = longer(said(cache, ids, model, prompt_lookup_num_tokens=4, max_new_tokens=12))
    assert cache.memory.transcript.digest.columns == cache.memory.fed
    for column in (2, 50, cache.memory.fed - 1):
        with pytest.raises(CacheError, match=NOT_THE_SAME):
            said(cache, edited(whole, column), model)
    said(cache, whole, model)


def test_after_a_crop_the_text_before_the_turn_is_known():
    model, ids = model_of("llama"), text(1, 30)
    cache = kvfold.cache(model, "full", prompt_tokens=0)
    for piece in ids.split(10, dim=1):
        feed(model, piece, cache)
    cache.crop(-5)
    refused(cache, edited(ids, 19))
    said(cache, edited(ids, 22))  # of this turn, which was taken back in part


def test_a_mark_brings_back_what_was_known():
    model, ids = model_of("llama"), text(1, 30)
    cache = kvfold.cache(model, "full")
    feed(model, ids[:, :10], cache)
    mark = cache.mark()
    feed(model, ids[:, 10:20], cache)
    cache.restore(mark)
    said(cache, edited(ids, 12))
    cache.reset()
    said(cache, edited(ids, 1))


def test_a_fork_knows_its_past_and_a_row_that_is_kept_knows_its_own():
    model, ids = model_of("llama"), text(2, 20)
    cache = kvfold.cache(model, "full")
    feed(model, ids[:, :16], cache)
    twin = cache.fork()
    feed(model, ids[:, 16:18], twin)
    refused(twin, edited(ids, 17, row=1), row=1)
    cache.batch_select_indices(torch.tensor([1]))
    refused(cache, ids[:1])
    said(cache, ids[1:])


def test_after_a_beam_search_the_row_of_the_answer_goes_on_and_no_other():
    cache = kvfold.cache(model_of("llama"), "full")
    whole = longer(said(cache, text(1, 20), num_beams=3))  # rows are left in an order of transformers' own
    others = cache.memory.transcript.digest.other_rows(whole.expand(3, -1))
    (of_answer,) = {0, 1, 2} - set(others)
    other = cache.fork()
    other.batch_select_indices(torch.tensor(others[:1]))
    refused(other, whole)
    cache.batch_select_indices(torch.tensor([of_answer]))
    said(cache, whole)


@pytest.mark.parametrize("plan", PLANS)
def test_a_saved_cache_knows_its_text(plan, tmp_path):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, least=0)
    whole = longer(said(cache, text(1, 20)))
    cache.save(tmp_path / "cache.kvfold")
    again = kvfold.load_cache(tmp_path / "cache.kvfold", model)
    refused(again, edited(whole))
    assert torch.equal(said(again, whole), said(cache, whole))
