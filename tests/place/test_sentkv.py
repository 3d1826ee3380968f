"""sentkv reads what it selected and nothing else, exactly its budget; tiers and reuse change no logits."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import avg_pool1d

import kvfold
from driving import close, exact, feed
from fakes import model_of, text
from kvfold.encode.dense import Dense
from kvfold.errors import BudgetError, CacheError, PlanError
from kvfold.memory.kv import KV
from kvfold.memory.part import slots_of_rows
from kvfold.memory.step import AttentionStep, ForwardScope
from kvfold.memory.transcript import Transcript
from kvfold.place.sentkv import SentKV

SMALL = "length=5, window=2, recent=2"


def run(plan, *, rows=1, tokens=120, stride=16):
    """Logits of a prompt and of single tokens after it, and the cache."""
    model, ids = model_of("llama"), text(rows, tokens)
    cache = kvfold.cache(model, plan, stride=stride)
    return feed(model, ids, cache, sizes=(tokens - 40, *[1] * 40)), cache


def test_a_budget_of_everything_gives_base_logits():
    found, cache = run("sentkv(budget=1.0)")
    assert close(found, exact("llama", text(1, 120)))
    assert cache.ledger().attended == 1.0


@pytest.mark.parametrize("other", ["tier='device'", "tier='disk', directory='{folder}'"])
@pytest.mark.parametrize("more", ["", " + int8", "snapkv(tokens=60) + "])
def test_host_and_disk_read_what_the_device_reads(tmp_path, other, more):
    base = f"sentkv(budget=24, {SMALL}"
    plans = [f"{base})", f"{base}, {other.format(folder=tmp_path)})"]
    plans = [more + plan if more.endswith("+ ") else plan + more for plan in plans]
    found = [run(plan, rows=2)[0] for plan in plans]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "more", ["every=1", "every=8", "every=8, when='drift'", "mean_of_unselected=True", "summary='halves'"]
)
def test_reuse_changes_what_is_fetched_and_no_logits(more):
    found, caches = zip(*(run(f"sentkv(budget=24, {SMALL}, {more}, reuse={on})") for on in (True, False)), strict=True)
    assert close(found[0], found[1])
    spent = [cache.ledger().traffic for cache in caches]
    assert spent[0].fetched < spent[1].fetched
    assert spent[1].reused == 0


@pytest.mark.parametrize("every", [1, 8])
def test_every_head_and_step_reads_exactly_the_budget(every):
    model, cache = model_of("llama"), kvfold.cache(model_of("llama"), f"sentkv(budget=24, {SMALL}, every={every})")
    feed(model, text(2, 90), cache)
    for step in range(12):
        feed(model, text(2, 1, seed=step), cache)
        for layer in cache.memory.layers.values():
            part = layer.state.folded
            slots = part.working.slots
            assert slots.shape == (4, 24 - 4)
            for of_head in slots.tolist():
                assert len(set(of_head)) == 20
                assert {part.counts[0][0] - 1, part.counts[0][0] - 2} <= set(of_head)


def test_what_a_question_looked_at_is_read_in_every_layer_and_head():
    model, ids = model_of("llama"), text(1, 96)
    cache = kvfold.cache(model, f"sentkv(budget=24, {SMALL}, query_scores=1.0, around=0)")
    feed(model, ids[:, :80], cache)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    feed(model, ids[:, 80:95], cache)
    feed(model, ids[:, 95:], cache)
    with torch.no_grad():
        weights = torch.stack(twin(ids[:, :95], output_attentions=True).attentions)[:, 0, :, -32:, 4:80]
    best = avg_pool1d(weights.amax(dim=2), 7, stride=1, padding=3, count_include_pad=False).amax(dim=(0, 1))
    for layer in cache.memory.layers.values():
        part = layer.state.folded
        sentences = list(zip(part.table.index.starts[0].tolist(), part.table.index.sizes[0].tolist(), strict=True))
        first = max(sentences, key=lambda one: float(best[one[0] : one[0] + one[1]].max()))
        assert all({*range(first[0], sum(first))} <= {*of_head} for of_head in part.working.slots.tolist())


def test_forwards_of_several_tokens_read_everything():
    model, ids = model_of("llama"), text(1, 120)
    cache = kvfold.cache(model, f"sentkv(budget=24, {SMALL}, offload_above=16)", prompt_tokens=110)
    found = feed(model, ids, cache, sizes=(20, 20, 20, 20, 20, 10))
    assert close(found, exact("llama", ids))


def test_a_prompt_in_pieces_never_lies_on_the_device_as_a_whole():
    model = model_of("llama")
    cache = kvfold.cache(model, f"sentkv(budget=24, {SMALL}, offload_above=32)", prompt_tokens=0)
    for piece in range(12):
        feed(model, text(1, 16, seed=piece), cache)
        assert all(layer.state.tail.length <= 32 for layer in cache.memory.layers.values())
    assert slots_of_rows(cache.memory.layers[0].state.folded) == [192 - 4 - cache.memory.layers[0].state.tail.length]


def test_unselected_slots_as_one_mean_are_nearer_to_everything_where_keys_are_alike():
    keys, values = 0.1 * torch.randn(1, 1, 200, 8), torch.randn(1, 1, 200, 8) + 3
    kv = KV(keys, values, torch.arange(200)[None, None])
    queries = torch.randn(1, 2, 1, 8)
    reading = AttentionStep(queries=queries, scale=0.35)
    selecting = replace(reading, forward=ForwardScope())
    errors = []
    for mean in (False, True):
        policy = SentKV(budget=24, length=5, window=2, recent=2, mean_of_unselected=mean).open(pinned=0)
        part = policy.place(Dense().pack(kv, torch.ones(1, 1, 200, dtype=torch.bool)), Transcript())
        whole, _ = part.attend(reading)
        some, _ = part.attend(selecting)
        errors.append(float((some.output - whole.output).norm() + (some.log_sum_exp - whole.log_sum_exp).norm()))
    assert errors[1] < errors[0] / 4


def test_when_a_sentence_ends_it_selects_anew():
    model = model_of("llama")
    plan = f"sentkv(budget=24, {SMALL}, when='sentence', every=100)"
    cache = kvfold.cache(model, plan, stride=None, tokenizer=Spelled())
    feed(model, torch.randint(10, 90, (1, 90)), cache)
    for token in (20, 21, STOP, 22, 23, STOP, STOP, 24, 25):
        feed(model, torch.tensor([[token]]), cache)
    assert cache.ledger().traffic.selections == 3 * 3  # layers, and stops that something came after


STOP = 5


class Spelled:
    """A tokenizer of 97 words, one of them a full stop."""

    def __len__(self):
        return 97

    def convert_ids_to_tokens(self, ids):
        return [f"w{number}" for number in ids]

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        return ["." if number == STOP else f" w{number}" for (number,) in rows]


@pytest.mark.parametrize(
    ("plan", "error", "hint"),
    [
        ("sentkv(budget=12)", BudgetError, "give budget=21 or more"),
        ("sentkv(budget=0)", BudgetError, "give 0.1, or 1024"),
        ("sentkv(budget=1.5)", BudgetError, "give 0.1, or 1024"),
        ("sentkv(window=15)", PlanError, "give a smaller window"),
        ("sentkv(every=0)", PlanError, "give 1 or more"),
        ("sentkv(tier='tape')", PlanError, "give one of .*host"),
        ("h2o(tokens=20) + sentkv", PlanError, "give one without such sums"),
    ],
)
def test_what_cannot_be_is_one_clear_line(plan, error, hint):
    with pytest.raises(error, match=hint) as caught:
        kvfold.cache(model_of("llama"), plan)
    assert "\n" not in str(caught.value)


def test_a_crop_of_what_was_moved_away_is_refused():
    _, cache = run(f"sentkv(budget=24, {SMALL})")
    with pytest.raises(CacheError, match="still raw"):
        cache.crop(-60)


def test_the_ledger_says_what_lies_where():
    _, cache = run(f"sentkv(budget=24, {SMALL})", tokens=200)
    ledger = cache.ledger()
    by_name = {part.name: part for part in ledger.parts}
    assert by_name["folded"].device == "host"
    assert by_name["folded"].slots == ledger.slots - by_name["sinks"].slots - by_name["tail"].slots
    assert ledger.resident_bytes == ledger.stored_bytes - by_name["folded"].stored_bytes
    assert "selections kept" in str(ledger)


def test_a_second_turn_from_the_same_moment_reads_its_own_slots():
    model, plan = model_of("llama"), f"full + sentkv(budget=24, {SMALL}, every=1)"
    first, one, other, last = (text(1, count, seed=seed) for seed, count in enumerate((90, 40, 40, 3)))

    def said(cache, turn):
        feed(model, turn, cache)
        cache.fold()
        return feed(model, last, cache, sizes=(1, 1, 1))

    caches = [kvfold.cache(model, plan, prompt_tokens=0) for _ in range(2)]
    for cache in caches:
        feed(model, first, cache)
        cache.fold()
    mark = caches[0].mark()
    said(caches[0], one)
    caches[0].restore(mark)
    assert close(said(caches[0], other), said(caches[1], other))


@pytest.mark.parametrize("way", ["decoded", "forked", "rows", "restored"])
def test_a_cache_goes_on_in_the_other_mode_without_gradients(way):
    model, ids = model_of("llama"), text(1, 100)
    cache = kvfold.cache(model, f"full + sentkv(budget=24, {SMALL}, every=1)", prompt_tokens=0)
    with torch.inference_mode():
        model(ids[:, :90], past_key_values=cache)
        cache.fold()
        model(ids[:, 90:91], past_key_values=cache)
        if way == "forked":
            cache = cache.fork()
        elif way == "rows":
            cache.reorder_cache(torch.tensor([0]))
        elif way == "restored":
            mark = cache.mark()
            model(ids[:, 91:93], past_key_values=cache)
            cache.mark()
            cache.restore(mark)
    with torch.no_grad():
        for at in range(91, 100):
            logits = model(ids[:, at : at + 1], past_key_values=cache).logits
    assert bool(logits.isfinite().all())
