"""Adapters that are switched in the middle of a text are noticed at the next call."""

import pytest
import torch

import kvfold
from driving import feed
from fakes import fresh, text
from kvfold.errors import CacheError


class Tuned(torch.nn.Module):
    """What peft puts in the place of a linear layer, as far as anybody asks it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.disable_adapters, self.active_adapters, self.merged_adapters = False, ["style"], []

    def forward(self, states):
        return self.base_layer(states) * (1.0 if self.disable_adapters else 1.1)


def tune(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj = Tuned(layer.self_attn.q_proj)


def switch(model, **settings):
    for layer in model.model.layers:
        for name, value in settings.items():
            setattr(layer.self_attn.q_proj, name, value)


def generate(model, cache, tokens):
    return model.generate(text(1, tokens), past_key_values=cache, max_new_tokens=3, eos_token_id=None)


@pytest.fixture
def model():
    model = fresh("llama")
    tune(model)
    return model


@pytest.mark.parametrize("call", [generate, lambda model, cache, tokens: feed(model, text(1, 2), cache)])
def test_an_adapter_that_is_switched_off_or_on_is_refused_until_it_is_switched_back(model, call):
    cache = kvfold.cache(model, "full")
    feed(model, text(1, 12), cache)
    switch(model, disable_adapters=True)
    words = "was fed with the adapters style in 3 layers was used without adapters; .*; switch back"
    for used in (cache, cache.fork()):
        with pytest.raises(CacheError, match=words) as error:
            call(model, used, 20)
    assert "\n" not in str(error.value)
    switch(model, disable_adapters=False)
    call(model, cache, 20)


def test_another_adapter_is_refused_and_merging_the_same_one_is_not(model):
    cache = kvfold.cache(model, "full")
    feed(model, text(1, 12), cache)
    switch(model, active_adapters=[], merged_adapters=["style"])
    feed(model, text(1, 2), cache)
    switch(model, active_adapters=["other"], merged_adapters=[])
    with pytest.raises(CacheError, match="used with the adapters other in 3 layers"):
        feed(model, text(1, 2), cache)
    feed(model, text(1, 2), kvfold.cache(model, "full"))


def test_adapters_that_are_added_behind_the_first_text_are_noticed_by_generate():
    model = fresh("llama")
    cache = kvfold.cache(model, "full")
    feed(model, text(1, 12), cache)
    tune(model)
    with pytest.raises(CacheError, match="was fed without adapters was used with the adapters style"):
        generate(model, cache, 20)


def test_adapters_that_are_added_behind_the_first_text_are_noticed_by_a_forward_of_a_turn():
    model = fresh("llama")
    cache = kvfold.cache(model, "full")
    feed(model, text(1, 12), cache)
    tune(model)
    with pytest.raises(CacheError, match="was fed without adapters was used with the adapters style in 3 layers"):
        feed(model, text(1, 2), cache)
