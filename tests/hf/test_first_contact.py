"""What a model does beside folded caches, and what is refused before one is made."""

import copy
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GptOssConfig, StaticCache, T5Config

import kvfold
from driving import close, feed
from fakes import fresh, text
from families.builder import small_model
from kvfold.errors import ModelError
from kvfold.hf.foreign import refuse_foreign


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_attention_of_before_is_back_with_the_last_cache(before):
    model = fresh("llama")
    model.set_attn_implementation(before)
    cache, other = (kvfold.cache(model, "full") for _ in range(2))
    assert model.config._attn_implementation == f"kvfold_{before}"
    del cache
    gc.collect()
    assert model.config._attn_implementation == f"kvfold_{before}"
    del other
    gc.collect()
    assert model.config._attn_implementation == before


def test_continuous_batching_is_refused_in_one_line_while_a_folded_cache_lives():
    model, prompts = fresh("llama"), [[5, 6, 7], [8, 9]]
    cache = kvfold.cache(model, "full")
    with pytest.raises(ModelError, match="let go of the model's folded caches first") as error:
        model.generate_batch(prompts, max_new_tokens=2)
    assert "\n" not in str(error.value)
    assert copy.deepcopy(model).init_continuous_batching.__func__ is type(model).init_continuous_batching
    del cache
    gc.collect()
    assert "init_continuous_batching" not in vars(model)
    assert model.config._attn_implementation == "sdpa"  # which is what it takes


def test_a_static_cache_and_none_at_all_answer_as_before_while_a_folded_one_lives():
    model, ids = fresh("llama"), text(1, 9)
    with torch.no_grad():
        wanted = model(ids).logits
        cache = kvfold.cache(model, "full")
        static = StaticCache(config=model.config, max_cache_len=32)
        assert torch.equal(model(ids).logits, wanted)
        assert close(model(ids, past_key_values=static).logits, wanted)
    assert close(feed(model, ids, cache), wanted)


def test_a_model_with_fewer_layers_than_it_was_made_with_ends_its_forwards():
    model = fresh("llama")
    del model.model.layers[-1]
    ids = text(1, 12)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    cache = kvfold.cache(model, "full")
    found = torch.cat([feed(model, ids[:, :7], cache), feed(model, ids[:, 7:], cache)], dim=1)
    assert cache.memory.fed == 12
    assert close(found, wanted)


@pytest.fixture(scope="module")
def with_softmax_sinks():
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight)  # zeros, as they are made, would hide a head that is mixed up
    return model


def test_softmax_sinks_take_their_share_of_every_query(with_softmax_sinks):
    model, ids = with_softmax_sinks, text(1, 30)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    cache = kvfold.cache(model, "full")
    found = torch.cat([feed(model, piece, cache) for piece in ids.split([20, 1, 9], dim=1)], dim=1)
    assert close(found, wanted)


@pytest.mark.parametrize("plan", ["int8", "snapkv(keep=0.5)", "h2o(keep=0.5)", "kvzip(keep=0.5)", "sentkv(budget=0.5)"])
def test_plans_run_on_a_model_with_softmax_sinks(with_softmax_sinks, plan):
    cache = kvfold.cache(with_softmax_sinks, plan, prompt_tokens=0, least=0)
    for count in (40, 1, 20):
        feed(with_softmax_sinks, text(1, count), cache)
        cache.fold()
    assert 0 < cache.ledger().slots <= 61 * 2 * 2  # tokens, layers that fold, heads


class Wrapper(torch.nn.Module):
    """What DataParallel and its like look like; the real one would look for devices."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def small_encoder_decoder():
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return AutoModelForSeq2SeqLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: "tiny", "is a name and no model; load it by"),
        (lambda: Wrapper(fresh("llama")), "give the model inside, its .module"),
        (small_encoder_decoder, "an encoder with a decoder"),
        (object, "is no model of transformers"),
    ],
)
def test_what_cannot_be_folded_is_refused_in_one_line_when_a_cache_is_asked_for(make, words):
    with pytest.raises(ModelError, match=words) as error:
        refuse_foreign(make())  # the first step of kvfold.cache(), whose types are checked here
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("falcon", "its FalconAttention computes attention by itself"),
        ("jetmoe", "works on the rows that it stored before it attends .key_states.repeat."),
        ("deepseek_v3", "its layers cache latents"),
        ("rwkv", "no layer of it stores keys and values"),
        ("blt", "transformers makes no cache of its configuration"),
    ],
)
def test_a_family_that_cannot_be_folded_is_refused_by_what_its_attention_does(family, words):
    with pytest.raises(ModelError, match=words) as error:
        kvfold.cache(small_model(family), "full")
    assert "\n" not in str(error.value)
