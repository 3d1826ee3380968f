"""A larger model has a gate for each layer, which reads that layer alone and is small beside the model."""

import torch

import kvfold
from fakes import model_of, text
from kvfold.adapters import adapter as adapters
from kvfold.adapters.adapter import Adapter, features_of
from kvfold.adapters.files import load_adapter, save_adapter
from kvfold.adapters.scorer import SlotScorer, TokenFeatures

SMOLLM2 = TokenFeatures(layers=30, heads=3, size=64, keys=True, by_layer=True)
SMOLLM2_WEIGHTS = 134_515_008


def test_gates_of_all_layers_are_at_most_a_hundredth_of_the_model():
    scorer = SlotScorer(SMOLLM2)
    learned = sum(weight.numel() for weight in scorer.parameters() if weight.requires_grad)
    assert learned <= 0.01 * SMOLLM2_WEIGHTS


def test_a_small_model_is_read_whole_and_a_large_one_layer_by_layer(monkeypatch):
    model = model_of("llama")
    assert not features_of(model).by_layer
    monkeypatch.setattr(adapters, "MOST_AT_ONCE", 8)
    assert features_of(model).by_layer


def described(adapter, features, *, changed=None):
    """Features of some tokens; the numbers of one layer may be others."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 12, features.layers, features.heads, features.size)
    keys, values = (torch.randn(shape, generator=generator) for _ in "kv")
    if changed is not None:
        keys[:, :, changed] += 1
        values[:, :, changed] -= 1
    positions = torch.arange(12).expand(2, -1)
    return adapter.features(keys, values, positions)


def test_a_layers_scores_depend_on_that_layer_alone(monkeypatch):
    monkeypatch.setattr(adapters, "MOST_AT_ONCE", 8)
    model = model_of("llama")
    adapter, features = Adapter.for_model(model, rank=2), features_of(model)
    real = torch.ones(2, 12, dtype=torch.bool)
    before, after = (adapter.scorer(described(adapter, features, changed=changed), real) for changed in (None, 1))
    moved = (before != after).flatten(0, 1).any(dim=-1).any(dim=-1).any(dim=0)
    assert moved.tolist() == [layer == 1 for layer in range(features.layers)]


def test_an_adapter_of_gates_is_loaded_as_it_was_and_holds_no_updates(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "MOST_AT_ONCE", 8)
    model = model_of("llama")
    adapter, features = Adapter.for_model(model, rank=2, rows=0), features_of(model)
    save_adapter(adapter, tmp_path, kind="sonic", model=model, about={})
    loaded = load_adapter(tmp_path, model, kind="sonic")
    assert not loaded.names
    real = torch.ones(2, 12, dtype=torch.bool)
    given = described(adapter, features)
    torch.testing.assert_close(loaded.scorer(given, real), adapter.scorer(given, real), rtol=2e-2, atol=2e-2)


def test_a_fold_goes_by_the_gates(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "MOST_AT_ONCE", 8)
    model = model_of("llama")
    save_adapter(Adapter.for_model(model, rank=2, rows=0), tmp_path, kind="sonic", model=model, about={})
    cache = kvfold.cache(model, f"sonic(keep=0.25, adapter={str(tmp_path)!r})", prompt_tokens=0, least=0)
    with torch.no_grad():
        model(text(1, 60), past_key_values=cache)
    cache.fold()
    held = sum(sum(map(sum, layer.state.folded.counts)) for layer in cache.memory.layers.values())
    assert 0 < held < 60 * features_of(model).layers * features_of(model).heads


def test_tokens_that_stand_together_are_scored_as_those_that_are_gathered(monkeypatch):
    monkeypatch.setattr(adapters, "MOST_AT_ONCE", 8)
    model = model_of("llama")
    adapter, features = Adapter.for_model(model, rank=2), features_of(model)
    given = described(adapter, features)
    together = torch.ones(2, 12, dtype=torch.bool)
    together[:, :3] = False
    apart = together.clone()
    apart[1, 7] = False  # rows differ: tokens are gathered
    found, wanted = (adapter.scorer.score(given, real) for real in (together, apart))
    assert torch.equal(found[:, 0, ..., 3:], wanted[:, 0, ..., 3:])
