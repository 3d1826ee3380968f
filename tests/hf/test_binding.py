"""One binding per model: its hooks are there while a cache that needs them lives, and gone with the last one."""

# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import copy
import gc
import threading
import weakref

import pytest
import torch

import kvfold
from driving import feed
from fakes import FAMILIES, fresh, model_of, text
from folding import adapter_for
from kvfold.hf.binding import ModelBinding
from kvfold.hf.hidden_states import attention_modules

READS_TEXT = "sentkv(budget=20, length=5, window=2, recent=2)"


def hooks(model):
    """How many hooks a model has, on all its modules."""
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def test_a_model_has_one_binding_and_a_copy_of_it_another():
    model = fresh("llama")
    binding = ModelBinding.of(model)
    assert ModelBinding.of(model) is binding
    assert ModelBinding.of(copy.deepcopy(model)) is not binding


def test_a_binding_goes_with_its_model():
    model = fresh("llama")
    cache = kvfold.cache(model, READS_TEXT)
    feed(model, text(1, 9), cache)
    watched = weakref.ref(ModelBinding.of(model))
    del model
    gc.collect()
    assert watched() is None
    assert cache.lease.binding is None
    assert cache.ledger().fed == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_rows_that_a_cache_is_given(family):
    model = model_of(family)
    binding, cache = ModelBinding.of(model), kvfold.cache(model, "full")
    feed(model, text(1, 5), cache)
    assert tuple(cache.memory.layers) == binding.folding_layers
    tail = cache.memory.layers[binding.folding_layers[0]].state.tail
    assert tail.keys.shape[1::2] == (binding.kv_heads, binding.head_size)
    assert cache.memory.layers[binding.folding_layers[0]].scale == pytest.approx(binding.scale)


@pytest.mark.parametrize("plan", ["full", "snapkv(keep=0.5)", "h2o(keep=0.5)", "kvzip(keep=0.5)", READS_TEXT, "sonic"])
def test_no_hook_is_there_before_the_first_cache_and_none_after_the_last(plan, tmp_path):
    model = fresh("llama")
    if plan == "sonic":
        plan = f"sonic(keep=0.3, verbatim=0.5, adapter={str(adapter_for('llama', tmp_path))!r})"
    assert hooks(model) == 0
    caches = [kvfold.cache(model, plan, prompt_tokens=0, least=0) for _ in range(2)]
    for cache in caches:
        feed(model, text(1, 40), cache)
        cache.fold()
        feed(model, text(1, 1), cache)
    del cache, caches
    gc.collect()
    assert hooks(model) == 0


@pytest.mark.parametrize("plan", ["full", "h2o(keep=0.5)", "kvzip(keep=0.5)", READS_TEXT, "sonic"])
def test_a_deleted_cache_is_freed_at_once_and_its_hooks_with_it(plan, tmp_path):
    model = fresh("llama")
    if plan == "sonic":
        plan = f"sonic(keep=0.3, verbatim=0.5, adapter={str(adapter_for('llama', tmp_path))!r})"
    gc.collect()
    gc.disable()  # what is freed is freed because nothing refers to it
    try:
        cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
        for tokens in (40, 1, 30):
            feed(model, text(1, tokens), cache)
            cache.fold()
        feed(model, text(1, 1), cache)
        twins = [cache.fork(), copy.deepcopy(cache)]
        watched = [weakref.ref(one) for one in (cache, cache.memory, *twins)]
        raw = weakref.ref(cache.memory.layers[0].state.tail.keys)
        del cache, twins
        assert raw() is None
        assert [one() for one in watched] == [None] * 4
        assert hooks(model) == 0
    finally:
        gc.enable()


def test_a_copied_cache_runs_its_passes_over_what_it_holds(tmp_path):
    model = fresh("llama")
    adapter = str(adapter_for("llama", tmp_path))
    cache = kvfold.cache(model, f"sonic(keep=0.3, verbatim=0.5, adapter={adapter!r})", prompt_tokens=0, least=0)
    feed(model, text(1, 40), cache)
    twin = copy.deepcopy(cache)
    cache.fold()
    wanted = feed(model, text(1, 9, seed=2), cache)
    del cache
    twin.fold()
    assert torch.equal(feed(model, text(1, 9, seed=2), twin), wanted)


def test_a_hook_stays_for_the_last_of_forks_and_copies():
    model = fresh("llama")
    cache = kvfold.cache(model, READS_TEXT)
    others = [cache.fork(), copy.deepcopy(cache), copy.deepcopy(cache.fork())]
    assert hooks(model) == 3  # of token ids as given and as embedded, and of the forward's end
    del cache
    while others:
        gc.collect()
        assert hooks(model) == 3
        feed(model, text(1, 20), others[-1])
        others.pop()
    gc.collect()
    assert hooks(model) == 0


def test_generate_of_a_model_is_watched_while_a_cache_lives_and_not_after():
    model = fresh("llama")
    before = dict(vars(model))
    cache = kvfold.cache(model, "snapkv(keep=0.5)")
    model.generate(text(1, 12), past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert vars(model).keys() - before.keys() == {"_prepare_model_inputs", "init_continuous_batching"}
    del cache
    gc.collect()
    assert vars(model) == before


def test_hooks_come_back_with_a_later_cache():
    model = fresh("llama")
    for _ in range(3):
        cache = kvfold.cache(model, READS_TEXT)
        assert hooks(model) == 3
        del cache
        gc.collect()
        assert hooks(model) == 0


def test_a_plan_that_records_nothing_of_a_forward_has_hooks_at_its_begin_and_its_end(tmp_path):
    model = fresh("llama")
    adapter = str(adapter_for("llama", tmp_path))
    plans = ("full", "snapkv(keep=0.5)", f"sonic(keep=0.3, verbatim=1.0, adapter={adapter!r})")
    caches = [kvfold.cache(model, plan, prompt_tokens=0, least=0) for plan in plans]
    for cache in caches:
        feed(model, text(1, 30), cache)
        cache.fold()
    assert hooks(model) == 2


def test_the_watch_of_a_model_that_drops_caches_is_there_while_one_lives():
    model = fresh("phi3", original_max_position_embeddings=20)
    assert hooks(model) == 0
    cache = kvfold.cache(model, "full")
    assert hooks(model) == 3
    assert cache.lease.text_limit == 19
    del cache
    gc.collect()
    assert hooks(model) == 0


def test_a_copy_of_a_model_that_speculates_runs_whole_forwards():
    model, twins = fresh("llama"), []
    cache = kvfold.cache(model, "snapkv(keep=0.5)")
    hook = model.lm_head.register_forward_hook(lambda *_: twins.append(copy.deepcopy(model)) if not twins else None)
    model.generate(text(1, 12), past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=4, do_sample=False)
    hook.remove()
    assert feed(twins[0], text(1, 5)).shape == (1, 5, 97)


def test_generate_leaves_nothing_of_its_text_in_a_cache():
    model = fresh("llama")
    cache = kvfold.cache(model, "snapkv(keep=0.5)")
    ids = text(1, 12)
    watched = weakref.ref(ids)
    model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=4, do_sample=False)
    assert cache.running.call is None
    assert hooks(model) == 2
    del ids
    assert watched() is None


def test_a_copy_of_a_model_with_hooks_has_idle_ones():
    model = fresh("llama")
    cache = kvfold.cache(model, READS_TEXT)
    twin = copy.deepcopy(model)
    feed(twin, text(1, 5))
    assert cache.lease.take_token_ids(1, 5) is None
    own = kvfold.cache(twin, READS_TEXT)
    feed(twin, text(1, 20), own)
    assert own.memory.fed == 20


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_that_projections_turn_into_keys(family):
    model = model_of(family)
    binding = ModelBinding.of(model)
    lease = binding.lease(hidden_states=True)
    seen, wanted = {}, {}

    def note(module, args, output):
        layer = layer_of[module]
        wanted[layer] = args[0]
        seen[layer] = binding.hidden_states.take(layer)

    modules = attention_modules(model, binding.folding_layers)
    layer_of = {}
    for index, module in modules.items():
        for name in ("v_proj", "qkv_proj"):
            if getattr(module, name, None) is not None:
                layer_of[getattr(module, name)] = index
    handles = [projection.register_forward_hook(note) for projection in layer_of]
    feed(model, text(2, 7))
    for handle in handles:
        handle.remove()
    assert sorted(seen) == list(binding.folding_layers)
    assert all(seen[layer] is wanted[layer] for layer in seen)
    del lease
    assert hooks(model) == 0


def test_hidden_states_are_taken_once_and_kept_alive_by_nobody():
    model = fresh("llama")
    binding = ModelBinding.of(model)
    lease = binding.lease(hidden_states=True)
    module = attention_modules(model, binding.folding_layers)[1]
    states = torch.zeros(1, 3, 32)
    binding.hidden_states(module, (), {"hidden_states": states})
    assert binding.hidden_states.take(0) is None
    assert lease.take_hidden_states(1) is states
    assert lease.take_hidden_states(1) is None
    binding.hidden_states(module, (states,), {})
    del states
    assert lease.take_hidden_states(1) is None


def test_each_thread_takes_its_own_hidden_states():
    model = fresh("llama")
    binding = ModelBinding.of(model)
    binding.lease(hidden_states=True)
    module = attention_modules(model, binding.folding_layers)[0]
    barrier, taken = threading.Barrier(2), {}

    def work(number):
        states = torch.full((1, 3, 32), float(number))
        binding.hidden_states(module, (), {"hidden_states": states})
        barrier.wait()
        taken[number] = binding.hidden_states.take(0)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: float(states[0, 0, 0]) for number, states in taken.items()} == {1: 1.0, 2: 2.0}


def test_a_module_put_in_later_is_part_of_the_model():
    model = fresh("llama")
    cache = kvfold.cache(model, "full")
    layer = model.get_decoder().layers[1]
    layer.self_attn = copy.deepcopy(layer.self_attn)
    assert feed(model, text(1, 6), cache).isfinite().all()
