"""Every forecast is held against the ledger of a cache that read a text, and costs no torch."""

import subprocess
import sys

import pytest
import torch

import fakes
import kvfold
from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import register_adapter
from kvfold.bench.advise.candidates import CANDIDATES
from kvfold.bench.advise.forecast import PlanSize, longest_context, stored_bytes
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.errors import ModelError
from kvfold.hf.load import SHIPPED
from kvfold.hf.model_shape import LayerShape, shape_of
from ranks import ranks_for

TOKENS = 400


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    made = fakes.fresh(request.param, head_dim=32)
    measured = ranks_for(made).measured
    register_adapter(made, "dynakv", lambda: Ranks(bases={}, measured=measured, default="joint"))
    register_adapter(made, "sonic", lambda: Adapter.for_model(made, rank=2).attach(made))
    return made


@pytest.fixture
def shape(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    return shape_of(str(tmp_path))


@pytest.mark.parametrize("plan", CANDIDATES)
def test_a_forecast_is_what_the_ledger_counts(model, shape, plan):
    cache = kvfold.cache(model, plan)
    with torch.no_grad():
        model(torch.randint(3, fakes.VOCABULARY, (1, TOKENS)), past_key_values=cache)
        cache.fold()  # methods that read their text again wait for the next forward otherwise
    held, size = cache.ledger().stored_bytes, CANDIDATES[plan]
    forecast = stored_bytes(size, shape, TOKENS, dtype="float32")
    if size.scored:  # a quiet segment spends less than its share
        assert 0.5 * forecast < held < 1.03 * forecast
    else:
        assert forecast == pytest.approx(held, rel=0.03)


def test_layers_that_slide_are_named_and_not_counted(tmp_path):
    fakes.fresh("gemma3").config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert len(shape.layers) == 2
    assert shape.others == {"sliding window": 2}


def test_layers_that_keep_latents_are_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "kv_lora_rank": 512}')
    with pytest.raises(ModelError, match="cache latents"):
        shape_of(str(tmp_path))


def test_a_folder_without_a_config_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        shape_of(str(tmp_path))


def test_the_shape_of_a_simple_family_is_read_without_torch():
    program = """
import sys
from kvfold.bench.advise.candidates import CANDIDATES
from kvfold.bench.advise.forecast import stored_bytes
from kvfold.hf.model_shape import shape_of
print(stored_bytes(CANDIDATES["int8(rotate=True)"], shape_of("tiny"), 8192, dtype="bfloat16"))
assert not {"torch", "transformers"} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout.strip().isdigit()


def test_transformers_agrees_about_the_shape_of_a_simple_family(monkeypatch):
    quick = shape_of("tiny")
    monkeypatch.setattr("kvfold.hf.model_shape._says_enough", lambda text: False)
    assert shape_of("tiny") == quick
    assert quick.layers == (LayerShape(kv_heads=3, key_size=32, value_size=32),) * 5
    assert (SHIPPED / "tiny").is_dir()


def test_the_longest_context_fits_and_one_token_more_does_not(shape):
    size = PlanSize(codec="int8")
    longest = longest_context(size, shape, 100_000, dtype="float32")
    assert stored_bytes(size, shape, longest, dtype="float32") <= 100_000
    assert stored_bytes(size, shape, longest + 1, dtype="float32") > 100_000
