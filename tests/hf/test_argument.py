"""A cache is given under the name that a model's forward knows, whatever release of transformers is installed."""

# pyright: reportCallIssue=false

import inspect
import warnings

import pytest
import transformers

import kvfold
from fakes import model_of, text
from kvfold.hf.argument import given, given_to_generate, taken


class Newer:
    def forward(self, ids, cache=None): ...


class Older:
    def forward(self, ids, past_key_values=None, **more): ...


def test_the_name_is_that_of_the_forward():
    past = object()
    assert given(Newer(), past) == {"cache": past}
    assert given(Older(), past) == {"past_key_values": past}


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_forward_names_its_cache_either_way(name):
    past = object()
    assert taken({name: past, "use_cache": True}) is past
    assert taken({"cache": None, "past_key_values": None}) is None


def test_models_of_this_release_and_its_generate_agree():
    known = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    assert next(iter(given_to_generate(object()))) in known


def test_no_warning_comes_from_a_forward_with_a_cache(capfd):
    model, ids = model_of("llama"), text(1, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        past = kvfold.cache(model)
        model.generate(ids, max_new_tokens=4, do_sample=False, **given_to_generate(past))
        model(ids[:, :1], **given(model, kvfold.cache(model)))
    assert "deprecated" not in capfd.readouterr().err
