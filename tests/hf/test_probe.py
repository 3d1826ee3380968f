"""Probes of attention: what is observed is what is attended, a replacement is used, and nothing stays on the model."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kvfold
from fakes import FAMILIES, fresh, model_of, text
from kvfold.hf.binding import ModelBinding
from kvfold.hf.probe import observe_attention, parallel_forward, replace_attention


def implementations(model):
    """The attention implementation of the model's configuration and of those inside it."""
    configurations = [model.config, *(getattr(model.config, name) for name in model.config.sub_configs)]
    return [one._attn_implementation for one in configurations]


def causal(_, queries, keys, values, scale):
    return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_observer_sees_every_full_attention_layer_and_changes_nothing(family):
    model, ids, seen = model_of(family), text(2, 40), {}

    def look(layer, queries, keys, values, scale):
        seen[layer] = (queries.shape[1], keys.shape, values.shape)

    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        with observe_attention(model, look):
            found = model(ids, use_cache=False).logits
    assert torch.equal(found, wanted)
    assert tuple(seen) == ModelBinding.of(model).folding_layers
    config = model.config.get_text_config(decoder=True)
    shape = (2, config.num_key_value_heads, 40, 8)
    assert set(seen.values()) == {(config.num_attention_heads, shape, shape)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replacement_is_what_the_layers_answer(family):
    model, ids = model_of(family), text(2, 40)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        with replace_attention(model, causal):
            found = model(ids, use_cache=False).logits
        with replace_attention(model, lambda *rows: 0 * causal(*rows)):
            silent = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(silent, wanted, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_parallel_forward_is_the_stock_one_with_and_without_a_written_mask(family):
    model, ids = model_of(family), text(2, 40)
    positions = torch.arange(40).expand_as(ids)
    back = torch.arange(40)[:, None] - torch.arange(40)
    full, window = back >= 0, (back >= 0) & (back < 16)
    folding = ModelBinding.of(model).folding_layers
    layers = range(model.config.num_hidden_layers)
    masks = {layer: (full if layer in folding else window).expand(2, 1, -1, -1) for layer in layers}
    with torch.no_grad():
        wanted = model.model(ids, use_cache=False).last_hidden_state
        plain = parallel_forward(model, ids=ids, positions=positions)
        masked = parallel_forward(model, ids=ids, positions=positions, masks=masks)
        added = {layer: torch.zeros(2, 1, 40, 40).masked_fill(~one, -torch.inf) for layer, one in masks.items()}
        biased = parallel_forward(model, ids=ids, positions=positions, masks=added)
    for found in (plain, masked, biased):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_conditional"])
@pytest.mark.parametrize("before", ["eager", "sdpa", "kvfold_sdpa"])
def test_the_attention_implementation_is_put_back_exactly(family, before):
    model, ids = fresh(family), text(1, 8)
    cache = kvfold.cache(model, "full")
    model.get_decoder().set_attn_implementation(before)
    kept = implementations(model)
    with torch.no_grad():
        parallel_forward(model, ids=ids, positions=torch.arange(8)[None])
        with observe_attention(model, lambda *_: None), replace_attention(model, causal):
            model(ids, use_cache=False)
    assert implementations(model) == kept
    with pytest.raises(RuntimeError, match="stop"), observe_attention(model, lambda *_: None):
        raise RuntimeError("stop")
    assert implementations(model) == kept
    assert cache.memory.fed == 0


def test_an_observer_of_a_parallel_forward_is_shown_the_keys_that_the_mask_hides():
    model, ids, seen = model_of("llama"), text(1, 12), []
    own = torch.eye(12, dtype=torch.bool)[None, None]
    with torch.no_grad(), observe_attention(model, lambda layer, q, keys, v, scale: seen.append(keys.shape[2])):
        hidden = parallel_forward(model, ids=ids, positions=torch.arange(12)[None], masks=dict.fromkeys(range(3), own))
        alone = parallel_forward(model, ids=ids[:, 5:6], positions=torch.tensor([[5]]))
    assert seen == [12] * 3 + [1] * 3
    torch.testing.assert_close(hidden[:, 5:6], alone, rtol=1e-4, atol=1e-4)
