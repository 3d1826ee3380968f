"""Models that somebody else copies, marks, collects or reads with stock caches while a folded cache is alive."""

# pyright: reportAttributeAccessIssue=false

import gc
import pickle
import threading

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kvfold
from driving import feed
from fakes import fresh, model_of, text
from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2", "of-my-own"])
def test_an_attention_that_nothing_can_stand_in_front_of_is_refused_in_one_line(name):
    AttentionInterface.register("of-my-own", sdpa_attention_forward)
    model = fresh("llama")
    model.config._attn_implementation_internal = name  # what loading leaves where its kernels are there
    with pytest.raises(ModelError, match="load the model with attn_implementation='sdpa'"):
        kvfold.cache(model, "full")
    assert model.config._attn_implementation == name


def test_a_model_that_is_pickled_has_the_attention_of_before():
    model, ids = fresh("llama"), text(1, 6)
    cache = kvfold.cache(model, "full")
    twin = pickle.loads(pickle.dumps(model))
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert feed(model, ids, cache).shape == feed(twin, ids, kvfold.cache(twin, "full")).shape


def test_ids_that_a_stock_cache_read_are_not_taken_for_those_of_a_folded_one():
    model, ids = model_of("llama"), text(2, 20)
    cache = kvfold.cache(model, "full")
    model(ids[:1], past_key_values=DynamicCache(config=model.config))
    model.model(ids[1:], past_key_values=cache)
    longer = torch.cat([ids[1:], text(1, 3)], dim=1)
    assert model.generate(longer, past_key_values=cache, max_new_tokens=2, do_sample=False).shape[1] == 25


def test_a_mark_from_before_a_beam_search_gives_back_one_row(tmp_path):
    model, ids = model_of("llama"), text(1, 12)
    cache = kvfold.cache(model, "full")
    feed(model, ids[:, :8], cache)
    mark = cache.mark()
    model.generate(ids, past_key_values=cache, num_beams=2, max_new_tokens=3, do_sample=False)
    cache.restore(mark)
    feed(model, ids[:, 8:], cache)
    cache.save(tmp_path / "one-row.kvfold")


def test_a_cache_that_is_collected_while_another_model_is_bound_stops_nothing(monkeypatch):
    model, other = fresh("llama"), fresh("llama")
    begin = ModelBinding.__init__

    def collecting(self, bound):
        gc.collect()
        begin(self, bound)

    gc.disable()
    try:
        cache = kvfold.cache(model, "full")
        cache.itself = cache
        del cache
        monkeypatch.setattr(ModelBinding, "__init__", collecting)
        thread = threading.Thread(target=ModelBinding.of, args=(other,), daemon=True)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive()
    finally:
        gc.enable()
