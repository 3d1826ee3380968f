"""Gates and rates: masks fall, a rate is met by what is stored, and learned members say what is wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfold
from driving import error, exact, feed
from fakes import model_of, text
from kvfold.adapters.ranks import save_ranks
from kvfold.encode.dynakv import DynaKV
from kvfold.encode.lowrank.gate import allocate_ranks, keep_probabilities
from kvfold.errors import FileError, ModelError, PlanError
from kvfold.plan import Plan
from ranks import form, gate, random_ranks, ranks_for


@pytest.fixture
def adapter(tmp_path):
    """A function that saves random ranks of a family's model, once."""

    def saved(family):
        folder = tmp_path / family
        if not folder.exists():
            save_ranks(ranks_for(model_of(family)), folder, model=model_of(family), about={})
        return str(folder)

    return saved


def test_a_soft_mask_starts_at_one_falls_and_adds_up_to_the_expected_rank():
    logits = torch.randn(50, 9)
    kept = keep_probabilities(logits)
    assert (kept[:, 0] == 1).all()
    assert (kept.diff(dim=1) <= 1e-6).all()
    place = logits.softmax(dim=1) @ torch.arange(9.0)
    assert torch.allclose(kept[:, 1:].sum(dim=1), place, rtol=1e-4, atol=1e-5)


def test_chances_are_summed_in_float32_whatever_comes_in():
    logits = torch.zeros(1, 1024, dtype=torch.bfloat16)
    assert keep_probabilities(logits).dtype == torch.float32
    assert math.isclose(float(keep_probabilities(logits)[0, 1]), 1023 / 1024, rel_tol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.floats(0.01, 1.0))
def test_a_rate_is_met_and_never_passed(count, rate):
    dims, size = [0, 2, 4, 8, 16, 32], 32
    levels = allocate_ranks(torch.randn(count, len(dims)) * 5, dims, rate=rate, size=size)
    kept = sum(dims[level] for level in levels.tolist())
    assert kept <= rate * size * count + 1e-6
    assert kept >= rate * size * count - size - 1e-6  # a slot may climb several levels at once


def test_ranks_are_the_same_from_bfloat16_and_float32():
    own = form(2, 8)
    keys, values = torch.randn(64, 2, 8).bfloat16(), torch.randn(64, 2, 8).bfloat16()
    positions, its_gate = torch.arange(64, dtype=torch.int32), gate(own)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        latents = own.bases.write(keys.to(dtype), values.to(dtype), positions)
        found.append(
            allocate_ranks(its_gate.logits(*latents), [sum(level) for level in own.levels], rate=0.4, size=own.size)
        )
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(("heads", "parts"), [(2, 1), (2, 2), (3, 3), (4, 4)])
def test_one_rank_for_all_lies_on_the_way_between_two_levels(heads, parts):
    own = form(heads, 8, parts=parts)
    for rate in [step / 100 for step in range(1, 101)]:
        keys, values = own.dims_at(rate)
        assert abs(keys + values - rate * own.size) <= 0.5 + 1e-9
        assert 0 <= keys <= 8 * heads
        assert 0 <= values <= 8 * heads
        assert keys % parts == 0


@pytest.mark.parametrize("basis", ["mixed", "heads", "rotated", "joint", "rotary"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_full_rank_gives_the_models_own_logits(family, basis, adapter):
    model, ids = model_of(family), text(2, 40)
    plan = Plan(encode=DynaKV(rate=1.0, basis=basis, adapter=adapter(family)))
    found = feed(model, ids, kvfold.cache(model, plan, stride=6), sizes=(20, 1, 1, 5, 1))
    wanted = exact(family, ids)
    assert error(found, wanted) < 1e-4 * float(wanted.square().mean().sqrt())


@pytest.mark.parametrize("deal", ["learned", "random", "even"])
def test_every_way_to_deal_keeps_as_many_bytes(deal, adapter):
    model = model_of("llama")
    cache = kvfold.cache(model, Plan(encode=DynaKV(rate=0.5, allocation=deal, adapter=adapter("llama"))))
    feed(model, text(1, 200), cache)
    folded = next(part for part in cache.ledger().parts if part.name == "folded")
    numbers = 196 * 2 * 2 * 8 * 4 * len(cache.memory.layers)  # tokens, keys and values, heads, head size, float32
    assert 0.45 < (folded.stored_bytes - 196 * 4 * len(cache.memory.layers)) / numbers <= 0.505


def test_the_ledger_says_what_the_maps_take_and_when_they_pay(adapter):
    model = model_of("llama")
    cache = kvfold.cache(model, Plan(encode=DynaKV(rate=0.5, adapter=adapter("llama"))))
    feed(model, text(1, 200), cache)
    ledger = cache.ledger()
    assert ledger.weight_bytes > 3 * 2 * 2 * 16 * 16 * 4  # layers, two maps each way
    assert ledger.stored_with_weights > ledger.stored
    saved = (ledger.full_bytes - ledger.stored_bytes) / ledger.seen
    assert ledger.break_even_tokens == math.ceil(ledger.weight_bytes / saved)
    assert "they pay from" in str(ledger)


@pytest.mark.parametrize("wrong", ["rate=0.0", "rate=1.5", "rate=-1.0", "basis='diagonal'", "allocation='best'"])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(PlanError, match="; "):
        Plan.parse(f"dynakv({wrong})")


def test_an_adapter_of_another_model_is_refused(adapter):
    other = model_of("mistral")
    with pytest.raises(ModelError, match="was trained for"):
        kvfold.cache(other, f"dynakv(adapter={adapter('llama')!r})")


def test_a_folder_without_an_adapter_and_a_basis_that_it_lacks_are_refused(tmp_path):
    model = model_of("llama")
    with pytest.raises(FileError, match="cannot be read"):
        kvfold.cache(model, f"pca(adapter={str(tmp_path)!r})")
    save_ranks(random_ranks(2, 8, [0, 1, 2]), tmp_path, model=model, about={})
    with pytest.raises(PlanError, match="the adapter has mixed, heads, rotated, rotary"):
        kvfold.cache(model, f"dynakv(basis='joint', adapter={str(tmp_path)!r})")
