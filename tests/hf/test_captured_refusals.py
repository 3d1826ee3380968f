"""What cannot be captured is refused in one line, and the cache goes on as it was."""

# pyright: reportCallIssue=false, reportArgumentType=false

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import kvfold
from captures import PROMPT, SETTINGS, TOKENS, alike, caches, said
from driving import close, feed
from fakes import fresh, model_of, text
from kvfold.errors import CacheError, KvfoldError, ModelError
from kvfold.memory.dense import DensePart
from tape import Tape


def refused(match, model, cache, ids=None, *, kind=CacheError, graph=Tape):
    """A captured step is refused in one line, and nothing is fed."""
    fed = cache.memory.fed if hasattr(cache, "memory") else None
    with pytest.raises(kind, match=match) as refusal:
        kvfold.captured(model, cache, graph=graph).step(text(1, 1) if ids is None else ids)
    assert isinstance(refusal.value, KvfoldError)
    assert "\n" not in str(refusal.value)
    if fed is not None:
        assert cache.memory.fed == fed


@pytest.mark.parametrize(
    ("plan", "settings", "match"),
    [
        ("sentkv(budget=0.3)", {}, "leave the place member away"),
        ("snapkv(tokens=20)", {"positions": "compact"}, 'or give positions="kept"'),
    ],
)
def test_a_plan_that_cannot_be_captured_is_refused(plan, settings, match):
    model = model_of("llama")
    cache, _ = caches(model, plan, text(1, PROMPT), **settings)
    refused(match, model, cache)


def test_positions_that_nothing_moves_are_captured():
    usual, other, wanted, found, _ = said(model_of("llama"), "full", text(1, TOKENS), positions="compact")
    assert close(found, wanted)
    assert alike(usual, other)


def test_a_codec_that_waits_for_the_device_is_refused(monkeypatch):
    model, of_part = model_of("llama"), DensePart.attend
    cache, _ = caches(model, "int8", text(1, PROMPT))

    def waiting(part, step):
        return of_part(part, replace(step, scale=float(step.queries.sum())))

    monkeypatch.setattr(DensePart, "attend", waiting)
    refused("int8 was asked for; capturing it failed .*the host waits for the device", model, cache)
    monkeypatch.undo()
    feed(model, text(1, 2), cache)
    assert cache.memory.fed == PROMPT + 2


def test_hidden_states_are_recorded_token_by_token_and_refused():
    model = model_of("llama")
    cache, _ = caches(model, "full", text(1, PROMPT))
    cache.lease.records_hidden_states = True
    refused("records hidden states, of each token at once", model, cache)


def test_what_is_no_folded_cache_of_the_model_is_refused():
    model, other = model_of("llama"), fresh("llama")
    cache, _ = caches(model, "full", text(1, PROMPT))
    refused("give the model that it was made for", other, cache)
    refused("a DynamicCache was given", model, DynamicCache(config=model.config))


def test_a_processor_has_no_graphs():
    model = model_of("llama")
    cache, _ = caches(model, "full", text(1, PROMPT))
    refused("cpu has no graphs; move the model to CUDA", model, cache, graph=None)


def test_layers_that_do_not_fold_are_refused():
    model = model_of("gemma3")
    cache, _ = caches(model, "full", text(1, PROMPT))
    refused("has layers that do not fold", model, cache)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_rotations_of_the_length_are_refused(family):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = fresh("llama", rope_parameters=scaling) if family == "llama" else model_of(family)
    cache, _ = caches(model, "full", text(1, PROMPT))
    refused("change with the length of the text", model, cache)


def test_pads_are_refused():
    model, ids = model_of("llama"), text(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = kvfold.cache(model, "snapkv(tokens=20)", least=0)
    feed(model, ids, cache, mask=mask)
    refused("rows are padded", model, cache, text(2, 1))


def test_another_attention_is_refused():
    model = fresh("llama")
    cache, _ = caches(model, "full", text(1, PROMPT))
    model.set_attn_implementation("eager")
    refused("attention was set to 'eager' after the cache was made", model, cache)


def test_tokens_that_do_not_fit_the_cache_are_refused():
    model = model_of("llama")
    cache, _ = caches(model, "full", text(2, PROMPT))
    refused(r"the cache holds 2 rows; give \[2, 1\]", model, cache, text(3, 1))
    refused(r"ids of shape \[2, 2\] were given", model, cache, text(2, 2))
    refused("nothing was fed yet", model, kvfold.cache(model, "full"))
    with pytest.raises(CacheError, match="room=0 was given"):
        kvfold.captured(model, cache, room=0, graph=Tape)


def test_a_position_that_the_model_does_not_have_is_refused():
    model = fresh("llama", max_position_embeddings=PROMPT)
    cache, _ = caches(model, "full", text(1, PROMPT))
    refused(f"has {PROMPT} positions", model, cache, kind=ModelError)


def test_a_step_inside_generate_is_refused():
    model, ids = model_of("llama"), text(1, PROMPT)
    cache = kvfold.cache(model, "full")
    decode = kvfold.captured(model, cache, graph=Tape)
    with pytest.raises(CacheError, match="wait until it is done"):
        model.generate(
            ids, past_key_values=cache, logits_processor=[lambda ids, scores: decode.step(ids[:, -1:])], **SETTINGS
        )
