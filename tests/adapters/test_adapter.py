"""An adapter acts inside its context and thread only, with or without a cache; its files stay what they were."""

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM

import kvfold
from driving import feed
from fakes import fresh, model_of, text
from folding import adapter_for
from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import find_adapter, load_adapter, register_adapter, save_adapter
from kvfold.adapters.folder import TENSORS
from kvfold.adapters.likeness import SAMPLES
from kvfold.adapters.ranks import layout_for, load_ranks, save_ranks
from kvfold.errors import ModelError
from kvfold.hf.load import SHIPPED, load
from kvfold.plan import Plan
from ranks import ranks_for


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def loud(model, *, seed=3):
    """An adapter whose updates are large enough to be seen."""
    torch.manual_seed(seed)
    adapter = Adapter.for_model(model, rank=2)
    with torch.no_grad():
        for up in adapter.up:
            up.normal_(std=0.1)
    return adapter


def test_updates_act_from_their_first_row_on():
    model, ids = fresh("llama"), text(1, 12)
    adapter, base = loud(model), feed(model, ids)
    with adapter.active(first=8):
        found = feed(model, ids)
    assert torch.equal(found[:, :8], base[:, :8])
    assert not torch.allclose(found[:, 8:], base[:, 8:], atol=1e-3)
    assert torch.equal(feed(model, ids), base)


def test_an_update_is_low_rank_and_added_to_a_linear_layer():
    model = fresh("llama")
    adapter, name = loud(model), "layers.1.mlp.up_proj"
    layer, number = model.get_decoder().get_submodule(name), adapter.names.index(name)
    inputs = torch.randn(2, 5, layer.in_features)
    with torch.no_grad(), adapter.active():
        found = layer(inputs)
    added = inputs @ (adapter.up[number] @ adapter.down[number]).T * adapter.scale
    torch.testing.assert_close(found, layer(inputs) + added)


def test_hooks_are_there_inside_the_context_only_however_it_is_left():
    model = fresh("llama")
    adapter = loud(model)
    assert hooks(model) == 0
    with adapter.active(), adapter.active(first=3):
        assert hooks(model) == len(adapter.names)
    assert hooks(model) == 0
    with pytest.raises(KeyError), adapter.active():
        raise KeyError
    assert hooks(model) == 0


def test_training_without_a_cache_reaches_everything_that_is_learned():
    model, ids = fresh("llama").requires_grad_(False), text(2, 9)
    adapter = loud(model)
    rows = adapter.embed(torch.zeros(2, 4, dtype=torch.long)) + model.get_input_embeddings()(text(2, 4))
    embedded = torch.cat([model.get_input_embeddings()(ids), rows], dim=1)
    with adapter.active(first=9):
        hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
    hidden[:, 9:].square().sum().backward()
    assert all(bool(up.grad.any()) for up in adapter.up)
    assert all(bool(down.grad.any()) for down in adapter.down)
    assert bool(adapter.embeddings.grad.any())


def test_two_threads_with_two_adapters_do_not_meet():
    model, ids = fresh("llama"), text(1, 10)
    adapters = [loud(model, seed=seed) for seed in (1, 2)]
    wanted = []
    for adapter in adapters:
        with adapter.active():
            wanted.append(feed(model, ids))
    found, barrier = [None, None, None], threading.Barrier(3)

    def run(at):
        barrier.wait()
        for _ in range(20):
            if at == 2:
                found[at] = feed(model, ids)
            else:
                with adapters[at].active():
                    found[at] = feed(model, ids)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], feed(model, ids))
    assert hooks(model) == 0


def test_scores_are_shares_of_one_wherever_a_rows_tokens_stand():
    model = model_of("llama")
    adapter = loud(model)
    features = adapter.scorer.features
    shape = (1, 7, features.layers, features.heads, features.size)
    keys, values, positions = torch.randn(shape), torch.randn(shape), torch.arange(7)[None]
    real = torch.ones(1, 7, dtype=torch.bool)
    scores, of_rows = adapter.score(keys, values, positions, real)
    assert scores.shape == of_rows.shape == (1, features.layers, features.heads, 7)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    assert bool((of_rows <= scores).all()), "untrained rows stand behind their tokens' slots"
    spread = torch.tensor([0, 1, 3, 4, 6, 7, 9])  # the same tokens with pads among them

    def apart(side):
        wide = torch.randn(1, 10, *side.shape[2:])
        wide[:, spread] = side
        return wide

    places = torch.zeros(1, 10, dtype=torch.long).index_copy(1, spread, positions)
    there = torch.zeros(1, 10, dtype=torch.bool).index_fill(1, spread, True)
    wide, _ = adapter.score(apart(keys), apart(values), places, there)
    torch.testing.assert_close(wide[..., spread], scores)


def test_keys_are_scored_as_they_were_before_rotation():
    model = model_of("llama")
    adapter = loud(model)
    features = adapter.scorer.features
    keys = torch.randn(1, 4, features.layers, features.heads, features.size)
    positions = torch.tensor([[0, 5, 9, 30]])
    found = adapter.features(keys, keys, positions)
    assert found.shape == (1, 4, features.width)
    at_start = adapter.features(keys, keys, torch.zeros_like(positions))
    torch.testing.assert_close(at_start, torch.cat([keys.flatten(2), keys.flatten(2)], dim=-1))
    torch.testing.assert_close(found[:, 0], at_start[:, 0])
    torch.testing.assert_close(found.norm(dim=-1), at_start.norm(dim=-1))
    assert not torch.allclose(found[:, 1:], at_start[:, 1:], atol=1e-3)


def test_the_shipped_files_load_and_are_written_as_they_were(tmp_path):
    model, _ = load("tiny")
    shipped = SHIPPED / "tiny" / "adapters"
    save_adapter(load_adapter("shipped", model, kind="sonic"), tmp_path / "sonic", kind="sonic", model=model, about={})
    save_ranks(load_ranks("shipped", model), tmp_path / "dynakv", model=model, about={})
    for kind in ("sonic", "dynakv"):
        before, after = (load_file(folder / kind / TENSORS) for folder in (shipped, tmp_path))
        if kind == "sonic":  # that of version 0.1.0, whose rows were of another kind
            assert after.keys() - before.keys() == {SAMPLES, "gates", "salience.rows.weight", "salience.rows.bias"}
            assert len(after["embeddings"]) == 0
            before.pop("embeddings")
        assert before.keys() <= after.keys()
        for name, tensor in before.items():
            # Bases are written in float16; measured ones are made orthogonal again when they are read.
            near = 2e-3 if name.startswith("measured.") or name.endswith(".encode") else 0.0
            torch.testing.assert_close(after[name].to(tensor.dtype), tensor, rtol=near, atol=near)


def test_a_state_saved_under_the_scorers_first_name_is_read():
    model = fresh("llama")
    one, other = loud(model, seed=1), loud(model, seed=2)
    state = one.state_dict()
    assert "salience.layers.0.weight" in state
    other.load_state_dict(copy.deepcopy(state))
    assert torch.equal(other.scorer.layers[0].weight, one.scorer.layers[0].weight)
    assert torch.equal(other.up[0], one.up[0])


def test_a_registered_adapter_is_the_shipped_one_and_is_built_once():
    model, built = fresh("llama"), []
    with pytest.raises(ModelError, match="no adapter ships for it"):
        kvfold.cache(model, "sonic(keep=0.5)")

    def build():
        built.append(1)
        return Adapter.for_model(model, rank=2)

    register_adapter(model, "sonic", build)
    assert not built
    select = Plan.parse("sonic(keep=0.5)").select
    assert find_adapter(model, select) is find_adapter(model, select)
    assert len(built) == 1
    kvfold.cache(model, "sonic(keep=0.5)")
    with pytest.raises(ModelError, match="no adapter ships for it"):
        kvfold.cache(fresh("llama"), "sonic(keep=0.5)")


def test_ranks_are_read_once_a_model_until_their_file_changes(tmp_path, monkeypatch):
    model, reads = fresh("llama"), []
    save_ranks(ranks_for(model), tmp_path, model=model, about={})
    encode = Plan.parse(f"dynakv(rate=0.5, adapter={str(tmp_path)!r})").encode
    monkeypatch.setattr("kvfold.adapters.ranks.load_ranks", lambda *given: reads.append(given) or load_ranks(*given))
    layout_for(model, encode)
    layout_for(model, encode)
    assert len(reads) == 1
    save_ranks(ranks_for(model), tmp_path, model=model, about={"again": True})
    layout_for(model, encode)
    assert len(reads) == 2


def test_an_adapter_of_values_alone_is_for_models_whose_rotations_cannot_be_undone(tmp_path):
    folder = adapter_for("llama", tmp_path)
    adapter = load_adapter(folder, model_of("llama"), kind="sonic")
    assert adapter.scorer.features.keys
    longrope = fresh("phi3")
    longrope.config.rope_parameters = {"rope_type": "longrope"}
    assert not Adapter.for_model(longrope, rows=4, rank=2).scorer.features.keys


def test_an_adapter_is_read_once_a_model_until_its_file_changes(tmp_path):
    model = fresh("llama")
    folder = adapter_for("llama", tmp_path)
    plan = f"sonic(keep=0.5, adapter={str(folder)!r})"
    one, other = (kvfold.cache(model, plan).adapter for _ in range(2))
    assert one is not None
    assert one is other
    save_adapter(one, folder, kind="sonic", model=model, about={"again": True})
    assert kvfold.cache(model, plan).adapter is not one
    model.bfloat16()
    assert kvfold.cache(model, plan).adapter.gates.dtype == torch.bfloat16


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_keys_are_read_only_where_they_turn_back_to_what_they_were(pairs):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config, made = {"halves": (LlamaConfig, LlamaForCausalLM), "neighbours": (GlmConfig, GlmForCausalLM)}[pairs]
    model = made(config(**sizes, **heads)).eval()
    adapter = Adapter.for_model(model, rank=2)
    assert adapter.scorer.features.keys == (pairs == "halves")
    places = torch.arange(3)[None]
    assert (adapter.moved(torch.randn(1, 4, 3, 8), places, places + 5) is None) == (pairs == "neighbours")
