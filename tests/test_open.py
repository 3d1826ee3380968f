"""What `kvfold.cache()` starts with: a floor that leaves short texts alone."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false

import pytest
import torch

import kvfold
import kvfold.cli.chat
from driving import feed
from fakes import model_of, text
from kvfold.errors import BudgetError, ModelError
from kvfold.open import PLAN
from plans import members

SHORT, LONG = 35, 300
EVICTING = ["none", *(f"{name}(keep=0.1)" for name in ("streaming_llm", "h2o", "snapkv", "chunkkv", "kvzip", "first"))]


def held(cache):
    """Slots of each layer, row and head, a mean."""
    ledger = cache.ledger()
    return ledger.slots / (ledger.layers * ledger.kv_heads)


@pytest.mark.parametrize("plan", [*EVICTING, "mean_pool(keep=0.1)", "summary(keep=0.1)", "sentkv(budget=0.06)"])
def test_a_short_text_is_left_alone_by_every_plan(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, stride=8)
    found = feed(model, text(1, SHORT + 20), cache, sizes=(SHORT, *(1,) * 20))
    wanted = feed(model, text(1, SHORT + 20), kvfold.cache(model, "full"), sizes=(SHORT, *(1,) * 20))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert held(cache) == SHORT + 20


@pytest.mark.parametrize("plan", EVICTING)
def test_a_longer_text_keeps_its_floor_and_gives_up_the_rest(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan)
    feed(model, text(1, LONG), cache, sizes=(LONG,))
    cache.fold()  # methods that choose jointly wait for the next forward
    once = cache.memory.rules.select.scope == "turn"
    assert held(cache) == 256 + (int(0.1 * (LONG - 256) / 2) if once else 0)


def test_without_a_floor_the_fraction_alone_holds():
    model = model_of("llama")
    cache = kvfold.cache(model, "streaming_llm(keep=0.5)", least=0)
    feed(model, text(1, 40), cache, sizes=(40,))
    assert held(cache) < 20
    cache = kvfold.cache(model, "streaming_llm(tokens=12)")
    feed(model, text(1, 40), cache, sizes=(40,))
    assert held(cache) == 12  # a budget in tokens is what it says


def test_another_budget_keeps_the_floor():
    model = model_of("llama")
    cache = kvfold.cache(model, "streaming_llm(keep=0.9)", least=20)
    feed(model, text(1, 40), cache, sizes=(40,))
    cache.rebudget(keep=0.1)
    assert held(cache) == 20


def test_every_method_with_a_fraction_has_a_floor():
    for kind in members("select").values():
        if "keep" in kind.__dataclass_fields__ and kind.__name__ not in ("Full", "Nothing"):
            assert kind(keep=0.5).budget.floor(seen=35, least=256, once=False) == 35


def test_the_command_line_names_the_plan_of_the_library():
    assert kvfold.cli.chat.PLAN == PLAN == str(kvfold.cache(model_of("llama")).plan)


def test_a_floor_below_nothing_is_refused():
    with pytest.raises(BudgetError, match="give at least 0"):
        kvfold.cache(model_of("llama"), "full", least=-1)


def test_the_text_of_a_cache_says_plan_tokens_and_bytes():
    model = model_of("llama")
    cache = kvfold.cache(model, "int8")
    feed(model, text(1, 40), cache, sizes=(40,))
    size = cache.ledger().stored_bytes
    assert repr(cache) == f"<FoldedCache int8: 40 tokens in {size:,} bytes of {cache.ledger().full_bytes:,}>"


def test_a_model_without_a_name_is_called_by_its_class():
    with pytest.raises(ModelError, match="sonic was asked for with LlamaForCausalLM; no adapter ships for it"):
        kvfold.cache(model_of("llama"), "sonic(keep=0.5)")


@pytest.mark.parametrize("dtype", ["float7", "int8", torch.int8, 16])
def test_a_dtype_that_no_model_computes_in_is_refused_before_anything_is_read(dtype):
    with pytest.raises(ModelError, match="is none that a model computes in; give 'float32'"):
        kvfold.load("tiny", dtype=dtype)


def test_device_and_dtype_may_be_left_to_the_machine():
    model, _ = kvfold.load("tiny", dtype="auto", device="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
