"""A fold that fails stands in nobody's way: the turn stays, and save, fork, budgets and the next turn work.

Every plan is tried, and every layer as the one where it fails. What is not folded waits, raw, for the next fold.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import kvfold
from fakes import model_of, text
from kvfold.chat.chat import Chat
from kvfold.errors import BudgetError, CacheError, FileError
from kvfold.memory.tail import Tail
from plans import lossy

LEARNED = ["sonic(keep=0.3)", "kvzip(keep=0.5)", "dynakv(rate=0.47) + sentkv(budget=0.1)"]
PLANS = {name: str(plan) for name, plan in lossy().items()} | {plan: plan for plan in LEARNED}
ALWAYS = ("full", "none", "h2o", "snapkv", "kvzip", "mean_pool", "int4", "dynakv", "sentkv", *LEARNED[:1])
FAILS_AT = [  # the layer in which the fold fails; the whole cross is slow
    pytest.param(at, name, marks=() if name in ALWAYS and at == len(name) % 2 * 2 else pytest.mark.slow)
    for name in PLANS
    for at in (0, 2)
]
SAYS = ("Where does Anna live?", "And the cat?", "The lamp costs 30.")


def say(chat, *texts):
    return ["".join(chat.send(one)) for one in texts]


def breaks(patched, error, *, at=0):
    """Let folds fail where the tail of a layer is cut, the `at`-th time and ever after; copies of a tail work."""
    calls, after = [0], Tail.after

    def broken(self, columns):
        is_fold = sys._getframe(1).f_code.co_filename.endswith("fold.py")
        calls[0] += is_fold
        if is_fold and calls[0] > at:
            raise error
        return after(self, columns)

    patched.setattr(Tail, "after", broken)


def goes_on(chat, model, tokenizer, folder):
    """Save, load, fork and speak: all three say the same."""
    chat.save(folder / "anna.kvfold")
    others = [chat.fork(), Chat.load(folder / "anna.kvfold", model, tokenizer)]
    replies = say(chat, *SAYS[2:])
    assert [say(other, *SAYS[2:]) for other in others] == [replies, replies]
    assert chat.ledger().fed == len(chat.ids)
    assert len(chat.turns) == 3


@pytest.mark.parametrize(("at", "name"), FAILS_AT)
def test_after_a_fold_that_failed_everything_works(begin, tiny, tmp_path, monkeypatch, name, at):
    chat = begin(PLANS[name])
    say(chat, SAYS[0])
    with monkeypatch.context() as patched:
        breaks(patched, FileError("no room"), at=at)
        # `full` leaves its tail as it is, so there is nothing that could fail.
        fails = pytest.raises(FileError, match=r"^no room \(the turn stays")
        with fails if chat.cache.memory.rules.folds else nullcontext():
            say(chat, SAYS[1])
        chat.ledger()
        chat.fork()
    assert len(chat.turns) == 2
    goes_on(chat, *tiny, tmp_path)
    tails = [layer.state.tail for layer in chat.cache.memory.layers.values()]
    if chat.cache.memory.rules.folds:
        assert {tail.length for tail in tails} == {0}, "the next fold took what the failed one had left"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError()])
def test_an_error_of_another_kind_passes_as_it_is(begin, tiny, tmp_path, monkeypatch, error):
    chat = begin("snapkv(keep=0.5)")
    say(chat, SAYS[0])
    with monkeypatch.context() as patched:
        breaks(patched, error)
        with pytest.raises(type(error)) as caught:
            say(chat, SAYS[1])
        assert caught.value is error
    goes_on(chat, *tiny, tmp_path)


@pytest.mark.parametrize("plan", ["h2o(keep=0.4)", "kvzip(keep=0.5)", "dynakv(rate=0.47)"])
def test_a_fold_inside_a_turn_that_fails_undoes_the_turn(begin, tiny, tmp_path, monkeypatch, plan):
    chat = begin(plan, stride=8)
    say(chat, SAYS[0])
    before = chat.messages, chat.ids, chat.ledger()
    with monkeypatch.context() as patched:
        breaks(patched, FileError("no room"))
        with pytest.raises(FileError, match=r"^no room$"):
            say(chat, SAYS[1])
    assert (chat.messages, chat.ids, chat.ledger()) == before
    say(chat, SAYS[1])
    goes_on(chat, *tiny, tmp_path)


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "kvzip", "int4", "sentkv"])
def test_marks_crops_and_rows_work_after_a_fold_that_failed(monkeypatch, name):
    model = model_of("llama")
    cache = kvfold.cache(model, PLANS[name], prompt_tokens=0)
    model(text(1, 20), past_key_values=cache)
    with monkeypatch.context() as patched:
        breaks(patched, FileError("no room"))
        with pytest.raises(FileError, match="no room"):
            cache.fold()
        cache.restore(cache.mark())
        cache.batch_repeat_interleave(2)
        if cache.memory.rules.allows_crop:
            cache.crop(-3)
    model(text(2, 3), past_key_values=cache)
    cache.fold()
    assert cache.ledger().fed == (20 if cache.memory.rules.allows_crop else 23)


def test_an_interrupted_fold_that_cannot_end_stands_in_nobodys_way(begin, tiny, tmp_path, monkeypatch):
    chat = begin("h2o(keep=0.4)")
    say(chat, SAYS[0])
    with monkeypatch.context() as patched:
        breaks(patched, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            say(chat, SAYS[1])
    with monkeypatch.context() as patched:
        breaks(patched, FileError("no room"))
        chat.fork().save(tmp_path / "fork.kvfold")
    chat.rebudget(keep=0.5)
    goes_on(chat, *tiny, tmp_path)


# A full disk --------------------------------------------------------------------------------------------------------


def on_disk(folder: Path, limit_bytes):
    return f"sentkv(budget=0.5, recent=2, length=5, window=2, tier='disk', directory={str(folder)!r}, {limit_bytes=})"


def test_a_disk_tier_at_its_limit_keeps_the_turn_and_folds_once_the_limit_is_raised(begin, tiny, tmp_path):
    chat = begin(on_disk(tmp_path, 65536))
    replies = []
    with pytest.raises(FileError, match=r"may have 65536; .* \(the turn stays"):  # noqa: PT012
        for _ in range(50):
            replies += say(chat, SAYS[0])
    turns = len(chat.turns)
    assert turns > len(replies)
    chat.save(tmp_path / "full.kvfold")
    chat.fork()
    with pytest.raises(FileError, match="the turn stays"):
        say(chat, SAYS[1])
    assert len(chat.turns) == turns + 1, "a turn that the tier has no room for is still a turn"
    with pytest.raises(BudgetError, match="bytes already"):
        chat.rebudget(limit_bytes=1)
    chat.rebudget(limit_bytes=1 << 24)
    assert "limit_bytes=16777216" in str(chat.plan)
    say(chat, SAYS[2])
    assert {layer.state.tail.length for layer in chat.cache.memory.layers.values()} == {0}


def test_raw_tokens_that_a_full_tier_does_not_take_stay_raw(tmp_path):
    model = model_of("llama")
    plan = on_disk(tmp_path, 4096).replace("recent=2", "recent=2, offload_above=8")
    cache = kvfold.cache(model, plan, prompt_tokens=0)
    model(text(1, 60), past_key_values=cache)
    with pytest.raises(FileError, match="give a larger limit_bytes"):
        cache.fold()
    full = kvfold.cache(model, "full")
    model(text(1, 60), past_key_values=full)
    found = [model(text(1, 1, seed=1), past_key_values=one).logits for one in (cache, full)]
    assert torch.allclose(*found, atol=1e-4)


# Budgets are judged when they are given -----------------------------------------------------------------------------


def test_a_budget_in_bytes_that_holds_nothing_is_refused_when_it_is_given(begin):
    with pytest.raises(BudgetError, match="give max_bytes="):
        begin("snapkv(max_bytes=100)")
    chat = begin("snapkv(keep=0.5)")
    for _ in range(2):
        with pytest.raises(BudgetError, match="give max_bytes="):
            chat.rebudget(max_bytes=1)
        assert str(chat.plan) == "snapkv(keep=0.5)"
        say(chat, SAYS[0])


def test_a_limit_is_refused_where_nothing_lies_in_a_file(begin):
    for plan in ("snapkv(keep=0.5)", "sentkv(budget=0.5)"):
        with pytest.raises(BudgetError, match="in no file"):
            begin(plan).rebudget(limit_bytes=10**6)


# Integers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["full", "snapkv(keep=0.5)", "kvzip(keep=0.5)", "mean_pool(keep=0.5)"])
@pytest.mark.parametrize("until", [-1, 21])
def test_a_fold_until_a_column_that_was_not_fed_is_refused(plan, until):
    model = model_of("llama")
    cache, calm = (kvfold.cache(model, plan, prompt_tokens=0) for _ in range(2))
    for one in (cache, calm):
        model(text(1, 20), past_key_values=one)
    with pytest.raises(CacheError, match="until="):
        cache.fold(until=until)
    for one in (cache, calm):
        one.fold(until=15)
    assert cache.ledger() == calm.ledger()
    assert {layer.state.tail.length for layer in cache.memory.layers.values()} == {5 if plan != "full" else 20}


@pytest.mark.parametrize("plan", ["full", "snapkv(keep=0.5)"])
def test_an_empty_prompt_is_one_line(plan):
    model = model_of("llama")
    cache = kvfold.cache(model, plan)
    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(CacheError, match="feed at least one"):
        model(empty, past_key_values=cache)
    model(text(1, 9), past_key_values=cache)
    assert cache.get_seq_length() == 9
