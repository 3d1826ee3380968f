"""SONIC's budgets and life in a cache; that its pass is what training sees stands in tests/train/sonic."""

# pyright: reportArgumentType=false, reportCallIssue=false

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvfold
from fakes import fresh, model_of, text
from folding import adapter_for
from kvfold.adapters.files import load_adapter
from kvfold.errors import BudgetError, FileError, ModelError, PlanError
from kvfold.hf import passes
from kvfold.hf.load import SHIPPED
from kvfold.plan import Plan
from kvfold.select.sonic import SAVED, compete


@pytest.fixture
def plan(tmp_path):
    return f"sonic(keep=0.3, adapter={str(adapter_for('llama', tmp_path))!r})"


def turns(model, cache, *, count=6, length=30, rows=1):
    """Feed and fold turn by turn; logits of all of them."""
    ids, answers = text(rows, count * length, seed=4), []
    for turn in range(count):
        with torch.no_grad():
            answers.append(model(ids[:, turn * length : (turn + 1) * length], past_key_values=cache).logits)
        cache.fold()
    return torch.cat(answers, dim=1)


def test_every_budget_is_met_by_the_ledger(tmp_path):
    model, adapter = model_of("llama").to(torch.float32), str(adapter_for("llama", tmp_path))
    for keep in (0.05, 0.1, 0.2, 0.5):
        cache = kvfold.cache(model, f"sonic(keep={keep}, adapter={adapter!r})", prompt_tokens=0, least=0)
        turns(model, cache, count=16)
        saved = keep * SAVED / 480 + 0.03  # of the tokens fed, and what rounding leaves
        ledger = cache.ledger()
        held = (ledger.stored_bytes - ledger.slack_bytes) / ledger.full_bytes  # without the room for later turns
        assert keep - saved <= held <= keep


def kept_by_head(cache):
    """How many slots each layer and head holds."""
    return [layer.state.folded.counts for layer in cache.memory.layers.values()]


def test_rows_and_words_share_one_budget(tmp_path):
    model, adapter = model_of("llama"), str(adapter_for("llama", tmp_path))
    answers, held = {}, {}
    for verbatim in (None, 0.0, 0.5, 1.0):
        cache = kvfold.cache(model, f"sonic(slots=6, verbatim={verbatim}, adapter={adapter!r})", prompt_tokens=0)
        answers[verbatim] = turns(model, cache, count=3)
        held[verbatim] = sum(sum(map(sum, counts)) for counts in kept_by_head(cache))
    assert len(set(held.values())) == 1
    for other in (None, 0.0, 0.5):
        assert not torch.allclose(answers[other], answers[1.0], atol=1e-4)


def test_a_row_may_win_some_heads_and_not_others():
    torch.manual_seed(2)
    slots, rows = torch.rand(2, 2, 3, 20)
    kept, made = compete(slots, rows, 6)
    wins = made.sum(dim=(0, 1))
    assert bool(((wins > 0) & (wins < 6)).any())
    assert int(kept.sum()) + int(made.sum()) == 6 * 6


def test_an_adapter_of_the_first_version_has_no_learned_rows(tmp_path):
    model, folder = model_of("llama"), adapter_for("llama", tmp_path)
    tensors = load_file(folder / "adapter.safetensors")
    width = tensors.pop("gates").shape[0]
    first = {name: tensor for name, tensor in tensors.items() if ".rows." not in name}
    first["embeddings"] = torch.randn(64, tensors["embeddings"].shape[1])
    save_file(first, folder / "adapter.safetensors")
    words = json.loads((folder / "adapter.json").read_text())
    del words["seal"]
    (folder / "adapter.json").write_text(json.dumps({**words, "version": 1, "rows": 64}))
    adapter = load_adapter(folder, model, kind="sonic")
    assert width
    assert not adapter.has_rows
    caches = [
        kvfold.cache(model, f"sonic(slots=6{more}, adapter={str(folder)!r})", prompt_tokens=0)
        for more in ("", ", verbatim=1.0")
    ]
    for cache in caches:
        turns(model, cache, count=1)
    assert kept_by_head(caches[0]) == kept_by_head(caches[1])


def test_keep_one_is_the_full_cache(plan):
    model = model_of("llama")
    found = turns(model, kvfold.cache(model, plan.replace("0.3", "1.0").replace("keep=1.0", "tokens=1000"),
                                      prompt_tokens=0))  # fmt: skip
    wanted = turns(model, kvfold.cache(model, "full", prompt_tokens=0))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_folding_feeds_nothing(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
    turns(model, cache, count=2)
    assert cache.get_seq_length() == 60
    assert cache.ledger().fed == 60
    assert cache.ledger().seen == 60


def test_a_forked_cache_goes_on_as_a_run_of_its_own(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
    turns(model, cache, count=2)
    twin = cache.fork()
    more = text(1, 9, seed=8)
    with torch.no_grad():
        first = model(more, past_key_values=twin).logits
        twin.fold()
        second = model(more, past_key_values=cache).logits
    assert torch.equal(first, second)
    assert twin.ledger().slots < cache.ledger().slots


def test_changing_a_folded_token_changes_later_logits_only_through_the_slots(plan):
    model = model_of("llama")
    caches, more = [], text(1, 7, seed=9)
    for seed in (1, 2):
        cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
        ids = text(1, 30, seed=1)
        ids[0, 12] = 3 + seed
        with torch.no_grad():
            model(ids, past_key_values=cache)
        cache.fold()
        caches.append(cache)
    one, other = caches
    with torch.no_grad():
        changed = not torch.equal(*(model(more, past_key_values=cache.fork()).logits for cache in caches))
        for index, layer in other.memory.layers.items():
            layer.state = one.memory.layers[index].state
        same = torch.equal(*(model(more, past_key_values=cache).logits for cache in caches))
    assert changed
    assert same


def test_an_interrupted_pass_is_done_again(plan, monkeypatch):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
    ids = text(1, 30, seed=1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    before = cache.ledger()
    monkeypatch.setattr(passes, "run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.fold()
    monkeypatch.undo()
    assert before.seen == 30
    cache.fold()
    assert cache.ledger().slots < before.slots


def test_a_lower_budget_than_is_held_is_refused(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
    turns(model, cache, count=4)
    with pytest.raises(BudgetError, match="a segment is folded once"):
        cache.rebudget(keep=0.1)
    assert str(cache.plan) == str(Plan.parse(plan))
    cache.rebudget(keep=0.5)


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path):
    folder = adapter_for("llama", tmp_path)
    with pytest.raises(ModelError, match="was trained for"):
        kvfold.cache(fresh("llama", num_hidden_layers=2), f"sonic(keep=0.2, adapter={str(folder)!r})")


def test_missing_newer_and_foreign_adapters_say_what_to_do(tmp_path, monkeypatch):
    model, folder = model_of("llama"), adapter_for("llama", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileError, match="give a folder"):
        load_adapter(tmp_path / "nowhere", model, kind="sonic")
    with pytest.raises(FileError, match="give a dynakv adapter"):
        load_adapter(folder, model, kind="dynakv")
    words = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**words, "version": 99}))
    with pytest.raises(FileError, match="upgrade kvfold"):
        load_adapter(folder, model, kind="sonic")


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("sonic", "give keep=, tokens= or max_bytes="),
        ("sonic(keep=0)", "at most 1"),
        ("sonic(keep=1.5)", "at most 1"),
        ("sonic(keep=0.2, slots=3)", "leave keep="),
        ("sonic(slots=0)", "give 1 or more"),
        ("sonic(keep=0.2, scope='history')", "leave scope away"),
    ],
)
def test_settings_that_cannot_be_say_what_to_give(asked, answer):
    with pytest.raises((PlanError, BudgetError), match=answer):
        Plan.parse(asked)


@pytest.mark.parametrize("kind", ["sonic", "dynakv"])
def test_shipped_adapters_name_their_base_without_saying_where_it_lay(kind):
    words = json.loads((SHIPPED / "tiny" / "adapters" / kind / "adapter.json").read_text())
    assert words["base"] == "tiny"


def test_a_head_keeps_a_token_once_so_rows_that_are_their_tokens_cost_nothing():
    slots = torch.rand(2, 3, 20)
    alone, nothing = compete(slots, None, 5)
    for shift in (-0.1, 0.1):
        kept, made = compete(slots, slots + shift, 5)
        assert not (kept & made).any()
        assert made.any() == (shift > 0)
        assert torch.equal((kept | made).sum(), alone.sum())
    kept, made = compete(slots, slots - 0.1, 5)
    assert torch.equal(kept, alone)
    assert not nothing.any()


def _folded(model, tokenizer, plan):
    """A cache of a text that is folded but for its end, and what the model says behind it."""
    prompt = "My sister Anna lives in a small town by the sea, and she paints the boats there. " * 12
    ids = torch.tensor([tokenizer(prompt).input_ids])
    cache = kvfold.cache(model, plan, least=0)
    with torch.no_grad():
        model(ids[:, :-40], past_key_values=cache)
        cache.fold()
        return cache, model(ids[:, -40:], past_key_values=cache).logits.log_softmax(dim=-1)


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_matched_rows_hold_the_same_slots_and_are_nearer_to_the_full_cache(keep):
    model, tokenizer = kvfold.load("tiny")
    _, full = _folded(model, tokenizer, "full")
    losses, caches = {}, {}
    for verbatim in (1.0, 0.0):
        caches[verbatim], said = _folded(model, tokenizer, f"sonic(keep={keep}, verbatim={verbatim})")
        losses[verbatim] = float((full.exp() * (full - said)).sum(dim=-1).mean())
    assert kept_by_head(caches[0.0]) == kept_by_head(caches[1.0])
    assert losses[0.0] < 0.98 * losses[1.0]
    words, rows = (caches[verbatim].memory.layers[0].state.folded for verbatim in (1.0, 0.0))
    for one, other in zip(words.counts[0], rows.counts[0], strict=True):
        assert one == other
