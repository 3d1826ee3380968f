"""A cache that was saved goes on as if it had not been, and leaves its process in no other way."""

# pyright: reportCallIssue=false

import copy
import io
import pickle

import pytest
import torch

import kvfold
from driving import feed
from fakes import fresh, model_of, text
from kvfold.chat.file import read_header
from kvfold.cli.main import run
from kvfold.errors import CacheError, FileError, ModelError

PLANS = ("snapkv(keep=0.5) + int8", "h2o(keep=0.4)", "sentkv(budget=0.3)")


def generated(model, cache, ids):
    mask = torch.ones(len(ids), cache.memory.fed + ids.shape[1], dtype=torch.long)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)[:, -12:]


@pytest.fixture
def begun():
    """A model, and a cache that has read something and folded."""
    cache = kvfold.cache(model_of("llama"), "h2o(keep=0.4)", stride=8, least=0)
    feed(model_of("llama"), text(1, 33), cache, sizes=(20,))
    return cache


@pytest.mark.parametrize(("family", "plan"), [*(("llama", plan) for plan in PLANS), ("gemma3", PLANS[0])])
def test_generation_goes_on_after_save_and_load_as_without(family, plan, tmp_path):
    model, ids = model_of(family), text(2, 5, seed=3)
    cache = kvfold.cache(model, plan, stride=8, least=0)
    feed(model, text(2, 33), cache, sizes=(20,))
    cache.save(tmp_path / "saved")
    again = kvfold.load_cache(tmp_path / "saved", model)
    assert (str(again.plan), again.memory.fed) == (str(cache.plan), 33)
    assert torch.equal(generated(model, again, ids), generated(model, cache, ids))
    assert again.ledger().slots == cache.ledger().slots


def test_a_padded_batch_and_a_cache_that_read_nothing_come_back(tmp_path):
    model = model_of("llama")
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    cache = kvfold.cache(model, "streaming_llm(tokens=12)")
    feed(model, text(2, 30), cache, mask=mask, sizes=(20,))
    cache.save(tmp_path / "padded")
    assert kvfold.load_cache(tmp_path / "padded", model).memory.seen == (21, 30)
    kvfold.cache(model, "int8", stride=8).save(tmp_path / "empty")
    empty = kvfold.load_cache(tmp_path / "empty", model)
    feed(model, text(1, 20), empty)
    assert empty.ledger().slots == 20 * 3 * 2


@pytest.mark.parametrize(
    "way", [pickle.dumps, copy.copy, lambda cache: torch.save(cache, io.BytesIO()), lambda cache: pickle.dumps([cache])]
)
def test_a_pickled_cache_says_in_one_line_how_to_save_it(begun, way):
    with pytest.raises(
        CacheError, match=r"cache\.save\(path\) and read it by kvfold\.load_cache\(path, model\)"
    ) as error:
        way(begun)
    assert "\n" not in str(error.value)


def test_what_a_cache_cannot_be_saved_or_loaded_with_is_one_line(begun, tmp_path, capsys):
    model, path = model_of("llama"), tmp_path / "cache"
    begun.save(path)
    with pytest.raises(CacheError, match="means nothing to another; load it with that one"):
        kvfold.load_cache(path, model_of("qwen3"))
    with pytest.raises(CacheError, match=r"it was saved by h2o\(keep=0.4\); give a plan of the same members"):
        kvfold.load_cache(path, model, plan="snapkv(keep=0.4)")
    assert str(kvfold.load_cache(path, model, plan="h2o(keep=0.3)").plan) == "h2o(keep=0.3)"
    with pytest.raises(FileError, match="read as a chat; it is another kind of safetensors file"):
        read_header(path)
    assert run(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.startswith("kind            cache\n")
    whole = bytearray(path.read_bytes())
    whole[-9] ^= 1
    path.write_bytes(whole)
    with pytest.raises(FileError, match="its tensors are not as they were written"):
        kvfold.load_cache(path, model)


def test_a_plan_that_names_a_folder_is_loaded_with_trust_only(tmp_path):
    model = model_of("llama")
    cache = kvfold.cache(model, f"sentkv(budget=0.3, tier='disk', directory={str(tmp_path)!r})", stride=8)
    feed(model, text(1, 33), cache, sizes=(20,))
    cache.save(tmp_path / "cache")
    with pytest.raises(CacheError, match="give trust=True if the file is yours"):
        kvfold.load_cache(tmp_path / "cache", model)
    assert kvfold.load_cache(tmp_path / "cache", model, trust=True).memory.fed == 33


def test_beams_and_a_cache_without_its_model_are_not_saved(begun, tmp_path):
    begun.reorder_cache(torch.tensor([0]))
    with pytest.raises(CacheError, match="keep one of them by batch_select_indices first"):
        begun.save(tmp_path / "beams")
    orphan = kvfold.cache(fresh("llama"), "full")
    with pytest.raises(ModelError, match="the model is gone; keep it alive"):
        orphan.save(tmp_path / "orphan")
