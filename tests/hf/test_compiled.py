"""A compiled model runs with a folded cache, which stays outside its graphs."""

import pytest
import torch

import kvfold
from fakes import fresh, text
from kvfold.errors import ModelError
from kvfold.hf.foreign import refuse_foreign

SETTINGS = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return fresh("llama", num_hidden_layers=1)


@pytest.mark.slow  # tracing one small layer takes seconds
def test_a_model_whose_forward_is_compiled_generates_the_same(model):
    ids, plan = text(1, 20), "snapkv(keep=0.5)"
    wanted = model.generate(ids, past_key_values=kvfold.cache(model, plan, least=0), **SETTINGS)
    cache = kvfold.cache(model, plan, least=0)  # before the model is compiled
    model.forward = torch.compile(model.forward, backend="eager")
    try:
        assert torch.equal(model.generate(ids, past_key_values=cache, **SETTINGS), wanted)
    finally:
        del model.forward
    assert cache.memory.fed == 22


def test_a_cache_of_a_compiled_model_is_asked_of_the_model_inside(model):
    with pytest.raises(ModelError, match=r"give the model inside, its \._orig_mod"):
        refuse_foreign(torch.compile(model, backend="eager"))  # the first step of kvfold.cache()
