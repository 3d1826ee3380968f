"""A chat goes on right however its history is folded, and a turn that was stopped has never been."""

import os
import signal
import threading

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from kvfold.chat.chat import Chat
from kvfold.errors import BudgetError, CacheError, DataError, ModelError, PlanError
from kvfold.hf.argument import given
from kvfold.memory.accounting import account

PLANS = ["full", "none", "streaming_llm(keep=0.4)", "h2o(keep=0.4) + int8", "snapkv(keep=0.4, window=8) + int4"]
TALK = ["Where does Anna live?", "And the cat?", "The lamp costs 30.", "How are you today?"]
SHORT = GenerationConfig(max_new_tokens=10)


@pytest.fixture
def begin(model, tokenizer):
    def begun(plan="snapkv(keep=0.4, window=8)", **settings):
        settings = {"generation": SHORT, "system": "You answer briefly.", **settings}
        return Chat(
            settings.pop("model", model), settings.pop("tokenizer", tokenizer), plan, **{"least": 0, **settings}
        )

    return begun


def say(chat, *texts):
    return ["".join(chat.send(text)) for text in texts]


def state(chat):
    """All that a turn changes."""
    return chat.messages, chat.ids, chat.turns, chat.ledger()


def test_a_reply_is_the_pieces_together_and_the_chat_says_what_it_holds(begin):
    chat, other = begin("int8"), begin("int8")
    assert [chat.reply(text) for text in TALK] == say(other, *TALK)
    assert repr(chat) == f"<Chat of 4 turns, on {chat.cache!r}>"
    pieces = other.send("And now?")
    next(pieces)
    assert "of 4 turns and an open one, on <FoldedCache int8: " in repr(other)
    pieces.close()
    assert repr(other) == repr(chat)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_with_a_full_cache_every_reply_is_what_the_model_says_to_the_whole_text(begin, make_model, family):
    model = make_model(family=family)
    chat = begin("full", model=model)
    say(chat, *TALK)
    for turn in chat.turns:
        prompt = torch.tensor([chat.ids[: turn.reply]])
        plain = model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=2)[0, turn.reply :].tolist()
        said = list(chat.ids[turn.reply : turn.stop])
        assert said == (plain if plain[-1] == 2 else [*plain, 2])


def test_what_was_fed_is_what_the_template_writes(begin, tokenizer):
    chat = begin()
    assert chat.messages == [{"role": "system", "content": "You answer briefly."}]
    replies = say(chat, *TALK)
    assert [message["content"] for message in chat.messages[2::2]] == replies
    written = tokenizer.apply_chat_template(chat.messages, tokenize=False)
    assert written.startswith("<|bos|><|system|> You answer briefly.<|end|><|user|> Where does Anna live?<|end|>")
    fed = tokenizer.decode(chat.ids)
    assert fed.count("<|user|>") == fed.count("<|assistant|>") == len(TALK)
    assert fed.endswith("<|end|>")


@pytest.mark.parametrize(
    ("plan", "settings"), [*((plan, {}) for plan in PLANS), (PLANS[3], {"raw_turns": 2}), (PLANS[4], {"stride": 8})]
)
def test_a_turn_feeds_only_its_own_tokens_and_the_closing_token(begin, model, tokenizer, plan, settings):
    chat, fed, widths = begin(plan, **settings), 0, []
    hook = model.register_forward_pre_hook(
        lambda _, positional, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    for text in TALK * 2:
        say(chat, text)
        turn = chat.turns[-1]
        own = tokenizer.encode(f"<|user|> {text}<|end|><|assistant|>", add_special_tokens=False)
        assert list(chat.ids[turn.start : turn.reply])[-len(own) :] == own
        assert turn.reply - turn.start == len(own) or turn.start == 0
        assert sum(widths) == len(turn), "every token of the turn once, and no other"
        assert chat.ids[turn.stop - 1] == tokenizer.eos_token_id
        fed += sum(widths)
        widths.clear()
    hook.remove()
    assert chat.ledger().fed == chat.ledger().seen == fed == len(chat.ids)


def test_folding_keeps_the_history_within_its_budget_and_the_system_prompt_raw(begin):
    chat = begin("streaming_llm(keep=0.5)")
    say(chat, *TALK * 4)
    ledger = chat.ledger()
    assert ledger.stored <= 0.5
    assert ledger.slack_bytes == 0
    for layer in chat.cache.memory.layers.values():
        pinned = chat.ids.index(2) + 1  # up to the end of the system prompt
        assert layer.state.sinks.positions[:pinned].tolist() == list(range(pinned))
        assert torch.equal(layer.state.tail.keys, layer.state.tail.keys[:, :, :0])


def test_without_a_system_prompt_four_tokens_are_pinned(begin):
    chat = begin(system=None)
    say(chat, TALK[0])
    layer = next(iter(chat.cache.memory.layers.values()))
    assert layer.state.sinks.counts == ((4, 4),)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_the_newest_turns_stay_raw_when_asked(begin):
    chat = begin("none", raw_turns=2)
    for count, text in enumerate(TALK, start=1):
        say(chat, text)
        raw = chat.ids[chat.turns[-2].start if count > 1 else 0 :]
        for layer in chat.cache.memory.layers.values():
            assert layer.state.tail.length == len(raw)


def test_a_stride_folds_inside_a_turn(begin):
    chat = begin("streaming_llm(tokens=40)", stride=16, generation=GenerationConfig(max_new_tokens=60, eos_token_id=[]))
    pieces = chat.send("Where does Anna live?")
    held = []
    for _ in pieces:
        held.append(account(chat.cache.memory, plan="", device="cpu", other_bytes=0, adapter_bytes=0).slots // 4)
    assert len(chat.ids) > 80
    assert max(held) <= 40 + 16


# A turn that was stopped ---------------------------------------------------------------------------------------------


def closed(chat):
    pieces = chat.send("Tell me everything.")
    next(pieces)
    pieces.close()


def dropped(chat):
    next(chat.send("Tell me everything."))


def thrown(chat):
    pieces = chat.send("Tell me everything.")
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)


def failed(chat, *, at=2):
    """The second layer fails in the middle of a reply."""
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == at:
            raise RuntimeError("out of memory")

    hook = chat.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        say(chat, "Tell me everything.")
    hook.remove()


def failed_at_once(chat):
    failed(chat, at=0)


def failed_in_the_closing(chat):
    failed(chat, at=10)


def pressed(chat):
    """Ctrl-C while the worker computes: a signal to this process, as a terminal sends it."""
    calls = iter(range(100))

    def press(*_):
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    hook = chat.model.model.layers[1].register_forward_pre_hook(press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        say(chat, "Tell me everything.")
    signal.signal(signal.SIGINT, before)
    hook.remove()


STOPS = [closed, dropped, thrown, failed, failed_at_once, failed_in_the_closing, pressed]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("family", "plan"), [("llama", PLANS[3]), ("gemma3", PLANS[4])])
def test_a_turn_that_was_stopped_has_never_been(begin, make_model, stop, family, plan):
    endless = GenerationConfig(max_new_tokens=10, eos_token_id=[])
    one, other = (begin(plan, model=make_model(family=family), generation=endless) for _ in range(2))
    for chat in (one, other):
        say(chat, *TALK[:2])
    before = state(one)
    stop(one)
    assert state(one) == before
    assert say(one, *TALK[2:]) == say(other, *TALK[2:])
    assert state(one) == state(other)


def test_a_first_turn_that_was_stopped_has_never_been(begin):
    one, other = begin(), begin()
    closed(one)
    assert state(one) == state(other)
    assert say(one, *TALK) == say(other, *TALK)


def test_an_interrupt_between_two_layers_folds_goes_on_at_the_next_turn(begin, monkeypatch):
    one, other = begin("h2o(keep=0.4)"), begin("h2o(keep=0.4)")
    say(other, *TALK)
    with monkeypatch.context() as patched:
        patched.setattr(one.cache.memory.layers[1], "fold", interrupt)
        with pytest.raises(KeyboardInterrupt):
            say(one, TALK[0])
    assert len(one.turns) == 1, "the reply was read and closed; only folding was stopped"
    say(one, *TALK[1:])
    assert state(one) == state(other)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_open_turn_refuses_everything_else(begin, tmp_path):
    chat = begin()
    pieces = chat.send("Where does Anna live?")
    chat.ledger()  # not begun yet
    next(pieces)
    for act in (chat.fork, chat.ledger, lambda: chat.save(tmp_path / "x"), lambda: chat.rebudget(keep=0.1)):
        with pytest.raises(CacheError, match="take the rest of its pieces"):
            act()
    with pytest.raises(CacheError, match="in the middle of a turn"):
        chat.send("Hello?")
    list(pieces)
    assert len(chat.turns) == 1


# What cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_message_is_an_error_before_the_turn(begin, text):
    chat = begin()
    with pytest.raises(DataError, match="say something"):
        chat.send(text)


def test_a_turn_that_cannot_fit_is_an_error_before_it(begin, make_model):
    chat = begin(model=make_model(positions=100))
    say(chat, TALK[0])
    before = state(chat)
    with pytest.raises(ModelError, match="the model has 100 positions") as caught:
        chat.send("word " * 40)
    assert "folding saves memory, not positions" in str(caught.value)
    assert state(chat) == before
    with pytest.raises(ModelError, match="positions"):
        say(chat, *TALK[1:2] * 10)
    assert len(chat.ids) <= 100
    assert chat.messages[-1]["role"] == "assistant"


def test_a_model_that_drops_its_cache_is_noticed(begin, model):
    chat = begin()
    say(chat, TALK[0])
    before = state(chat)
    hook = model.register_forward_pre_hook(
        lambda _, positional, named: (positional, {**named, **given(model, DynamicCache())}), with_kwargs=True
    )
    with pytest.raises(CacheError, match="the model dropped or bypassed it"):
        say(chat, TALK[1])
    hook.remove()
    assert state(chat) == before


def test_beams_are_refused(begin):
    with pytest.raises(ModelError, match="give num_beams=1"):
        begin(generation=GenerationConfig(num_beams=2))


def test_folding_settings_that_contradict_are_refused(begin):
    with pytest.raises(PlanError, match="give one of the two"):
        begin(raw_turns=1, stride=8)
    with pytest.raises(PlanError, match="raw_turns=-1"):
        begin(raw_turns=-1)
    with pytest.raises(BudgetError, match="pinned"):
        begin("streaming_llm(tokens=8)")


# How a reply ends ---------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_reply_and_the_closing_token_follows(begin):
    free = begin(generation=GenerationConfig(max_new_tokens=10, eos_token_id=[]))
    say(free, TALK[0])
    turn = free.turns[0]
    said = list(free.ids[turn.reply : turn.stop - 1])
    assert len(said) == 10
    chat = begin(generation=GenerationConfig(max_new_tokens=10, eos_token_id=said[4]))
    say(chat, TALK[0])
    cut = said[: said.index(said[4])]
    assert list(chat.ids[turn.reply :]) == [*cut, chat.tokenizer.eos_token_id]
    say(chat, TALK[1])


def test_a_stop_string_ends_a_reply(begin, tokenizer):
    free = begin(generation=GenerationConfig(max_new_tokens=10, eos_token_id=[]))
    reply = say(free, TALK[0])[0]
    turn = free.turns[0]
    string = tokenizer.decode(free.ids[turn.reply + 3])
    chat = begin(generation=GenerationConfig(max_new_tokens=10, eos_token_id=[], stop_strings=[string]))
    assert reply.startswith(say(chat, TALK[0])[0])
    assert len(chat.ids) < len(free.ids)


def test_sampling_follows_the_seed_and_the_settings(begin):
    sampled = GenerationConfig(max_new_tokens=10, do_sample=True, temperature=1.5)
    replies = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        replies.append(say(begin(generation=sampled), *TALK[:2]))
    assert replies[0] == replies[1] != replies[2]


def test_the_settings_of_the_caller_are_not_changed(begin, model):
    given = GenerationConfig(max_new_tokens=7)
    before, own = given.to_dict(), model.generation_config.to_dict()
    say(begin(generation=given), TALK[0])
    say(begin(generation=None, model=model), TALK[0])
    assert given.to_dict() == before
    assert model.generation_config.to_dict() == own


# Two ways on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_fork_and_its_origin_are_two_separate_chats(begin, make_model, plan, family):
    model = make_model(family=family)
    one, alone, other = (begin(plan, model=model) for _ in range(3))
    for chat in (one, alone, other):
        say(chat, *TALK[:2])
    twin = one.fork()
    assert say(one, TALK[2]) == say(alone, TALK[2])
    assert say(twin, TALK[3], TALK[0]) == say(other, TALK[3], TALK[0])
    assert say(one, TALK[3]) == say(alone, TALK[3])
    assert (state(one), state(twin)) == (state(alone), state(other))


def test_two_chats_of_one_model_in_two_threads_are_right(begin, model):
    alone = [say(begin(plan), *TALK) for plan in PLANS[2:4]]
    together: dict[int, list[str]] = {}
    chats = [begin(plan) for plan in PLANS[2:4]]
    threads = [threading.Thread(target=lambda at=at: together.update({at: say(chats[at], *TALK)})) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[0], together[1]] == alone


def test_a_lower_budget_evicts_at_once_and_a_plan_without_one_says_so(begin):
    chat = begin("streaming_llm(keep=0.9)")
    say(chat, *TALK * 2)
    before = chat.ledger().stored
    chat.rebudget(keep=0.4)
    assert chat.ledger().stored <= 0.4 < before
    assert str(chat.plan) == "streaming_llm(keep=0.4)"
    say(chat, TALK[0])
    with pytest.raises(BudgetError, match="has none to change"):
        begin("int8").rebudget(keep=0.5)


def test_settings_of_replies_are_named_or_a_configuration(begin):
    by_name, configured = (begin("full", generation=given) for given in ({"max_new_tokens": 10}, SHORT))
    assert by_name.reply("Hello there.") == configured.reply("Hello there.")
    with pytest.raises(ModelError, match="'max_tokens'; transformers' GenerationConfig has no such setting"):
        begin("full", generation={"max_tokens": 10})
    for bad in ({"max_new_tokens": -5}, {"num_beams": "two"}, {"do_sample": True, "temperature": -1.0}):
        with pytest.raises(ModelError, match="of at least"):
            begin("full", generation=bad)


def test_half_of_a_character_is_refused_before_it_is_read(begin):
    chat = begin("full")
    with pytest.raises(DataError, match="half of a pair"):
        chat.reply("Anna \udcff")
    assert len(chat.turns) == 0
