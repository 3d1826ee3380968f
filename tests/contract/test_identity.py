"""Contract 1, 2, 3 and 4: lossless plans give the base model's logits; chunks, pads and grouping change nothing."""

import copy
from functools import cache as once

import pytest
import torch
from transformers import DynamicCache

import kvfold
from driving import Oracle, close, error, exact, feed, kept
from fakes import FAMILIES, exact_twin, fresh, model_of, text
from kvfold.plan import Plan
from plans import TOKENS, EvenPositions, Uneven, lossless, lossy, mostly, pairs

LOSSLESS, LOSSY, PAIRS = lossless(), lossy(), pairs()
EXACT = {name: plan for name, plan in LOSSY.items() if plan.encode.lossless}
ATTENDED = {name: plan for name, plan in EXACT.items() if plan.place == Plan().place}  # all that is held is read
DROPS = {
    name: plan for name, plan in ATTENDED.items() if not plan.select.chooses_jointly
}  # what stays is what was there
WAYS = ((), (7, 7, 7, 7), (26, *[1] * 14))
JOINT_WAYS = ((24, 6, 6, 4), (7, 7, 10, 3, 3, 5, 1, 4), (24, *[1] * 16))  # a pass runs between two forwards
SIZES = (20, 1, 1, 5, 1)


@once
def rounded(family):
    """A family's model in bfloat16, the same rounded weights in float64, and what stock attention errs with."""
    half = copy.deepcopy(model_of(family)).bfloat16()
    wide = copy.deepcopy(half).double()
    wide.set_attn_implementation("eager")
    wanted = feed(wide, text(2, 40))
    half.set_attn_implementation("sdpa")
    stock = feed(half, text(2, 40), DynamicCache(config=half.config.get_text_config()), sizes=SIZES)
    return half, wanted, error(stock, wanted)


@once
def single(family):
    model, wanted = model_of(family), exact(family, text(2, 40))
    stock = feed(model, text(2, 40), DynamicCache(config=model.config.get_text_config()), sizes=SIZES)
    return model, wanted, error(stock, wanted)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_plans_err_at_most_twice_as_much_as_stock_attention(family, name):
    for model, wanted, stock in (single(family), rounded(family)):
        found = feed(model, text(2, 40), kvfold.cache(model, LOSSLESS[name], stride=6), sizes=SIZES)
        assert error(found, wanted) <= 2 * stock


def differs(name, plan, family):
    """The oracle of a plan on one family, fed in chunks that end where the cache folds."""
    model, ids = model_of(family), text(1, 60, seed=4)
    cache, sizes = kvfold.cache(model, plan, stride=8, least=0), (30, 8, 3, 5, 8, 6)
    oracle, found, at = Oracle(family, cache), [], 0
    for size in sizes:
        oracle.note(size)
        found.append(feed(model, ids[:, at : at + size], cache))
        at += size
    assert cache.memory.fed == at
    return torch.cat(found, dim=1), oracle.logits(ids)


@pytest.mark.parametrize("name", mostly(DROPS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_member_reads_just_what_it_kept(family, name):
    found, wanted = differs(name, DROPS[name], family)
    assert close(found, wanted)
    if DROPS[name].select.budget is not None:
        assert not close(found, exact(family, text(1, 60, seed=4)))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_heads_that_keep_different_numbers_read_just_what_they_kept(family):
    plan = Plan(select=Uneven(tokens=TOKENS))
    found, wanted = differs("uneven", plan, family)
    assert close(found, wanted)
    cache = kvfold.cache(model_of(family), plan, least=0)
    feed(model_of(family), text(1, 60, seed=4), cache)
    assert len({len(head) for head in next(iter(kept(cache).values()))[0]}) > 1


def ways(plan, family="llama"):
    """Logits and slots after 40 tokens with the same boundaries, fed in three ways, one of them token by token.

    Codecs that round are fed in float64: in float32 a chunk's own noise may carry a value over a rounding edge.
    """
    model = model_of(family) if plan.encode.lossless else exact_twin(family)
    ids, answers = text(2, 40, seed=6), []
    for sizes in JOINT_WAYS if plan.select.chooses_jointly else WAYS:
        cache = kvfold.cache(model, plan, prompt_tokens=24, stride=6, least=0)
        answers.append((feed(model, ids, cache, sizes=sizes), kept(cache)))
    return answers


@pytest.mark.parametrize("name", mostly(LOSSY))
def test_any_chunking_gives_the_same_logits_and_slots(name):
    one, *others = ways(LOSSY[name])
    assert all(close(logits, one[0]) and slots == one[1] for logits, slots in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_any_chunking_gives_the_same_logits_and_slots_on_every_family(family, name):
    one, *others = ways(EXACT[name], family)
    assert all(close(logits, one[0]) and slots == one[1] for logits, slots in others)


@pytest.mark.parametrize("name", mostly(PAIRS))
def test_pairs_are_chunked_alike(name):
    one, *others = ways(PAIRS[name])
    assert all(close(logits, one[0]) and slots == one[1] for logits, slots in others)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", mostly([*LOSSY, "uneven"]))
def test_a_padded_batch_is_its_rows_one_by_one(name, side):
    plan = LOSSY.get(name, Plan(select=Uneven(tokens=TOKENS)))
    model, lengths = model_of("llama"), (30, 3, 17)
    ids, mask = text(3, 30, seed=8), torch.zeros(3, 30, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(30 - length, 30) if side == "left" else slice(0, length)] = 1
    more, whole = text(3, 6, seed=9), torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], dim=1)
    cache = kvfold.cache(model, plan, least=0)
    found = [feed(model, ids, cache, mask=mask), feed(model, more, cache, mask=whole)]
    assert all(answer.isfinite().all() for answer in found)
    together = kept(cache)
    for row in range(3):
        own = kvfold.cache(model, plan, least=0)
        wanted = [feed(model, ids[row : row + 1, mask[row] == 1], own), feed(model, more[row : row + 1], own)]
        assert close(found[0][row, mask[row] == 1][None], wanted[0])
        assert close(found[1][row : row + 1], wanted[1])
        assert all(together[layer][row] == held[0] for layer, held in kept(own).items())


@pytest.mark.parametrize(
    "name", [*(name for name, plan in LOSSLESS.items() if not plan.select.chooses_jointly), "even"]
)
def test_grouped_queries_equal_the_same_weights_expanded(name):
    plan = LOSSLESS.get(name, Plan(select=EvenPositions(tokens=TOKENS)))
    model = model_of("llama")
    wide = fresh("llama", num_key_value_heads=4)
    weights = dict(model.state_dict())
    for key in list(weights):
        if "k_proj" in key or "v_proj" in key:
            weights[key] = weights[key].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    wide.load_state_dict(weights)
    found = [feed(m, text(2, 40), kvfold.cache(m, plan, stride=6, least=0), sizes=SIZES) for m in (model, wide)]
    assert close(found[0], found[1])
