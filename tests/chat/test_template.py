"""Templates that add are used as they are, templates that rewrite are refused, and without one there is a plain one."""

import pytest
from transformers import GenerationConfig

from kvfold.chat.chat import Chat
from kvfold.chat.template import Template
from kvfold.chat.text import Detokenizer
from kvfold.data import Message
from kvfold.errors import ModelError

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FORGETS_THOUGHTS = (  # writes something before the last reply only, as templates of reasoning models do
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ 'Hm. ' }}{% endif %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>Hm. ' }}{% endif %}"
)
SYSTEM_LAST = (  # writes the system prompt before the newest question, wherever that is
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{% if m['role'] == 'user' and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ messages[0]['content'] + ' ' }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def test_a_turn_is_what_the_template_adds(tokenizer):
    tokenizer.chat_template = CHATML
    template = Template(tokenizer, system=None)
    talk = [Message(role="user", content="Anna"), Message(role="assistant", content="Turin")]
    assert tokenizer.decode(template.opening(talk, "cat?")) == "<|user|>cat?<|end|>\n<|assistant|>"
    assert tokenizer.decode(template.closing().ids) == "<|end|>\n"
    assert template.closing().stop == (tokenizer.eos_token_id,)


def test_the_line_break_behind_a_closing_token_is_fed_with_it(model, tokenizer):
    tokenizer.chat_template = CHATML
    chat = Chat(model, tokenizer, "full", generation=GenerationConfig(max_new_tokens=4))
    for text in ("Anna?", "Turin?"):
        list(chat.send(text))
    assert tokenizer.decode(chat.ids).count("<|end|>\n") == 4


@pytest.mark.parametrize(("template", "system"), [(FORGETS_THOUGHTS, None), (SYSTEM_LAST, "You answer briefly.")])
def test_a_template_that_rewrites_old_turns_is_refused_before_the_first(tokenizer, template, system):
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=r"rewrites old turns|writes a reply differently") as caught:
        Template(tokenizer, system=system)
    assert "or None for a plain one" in str(caught.value)


def test_a_template_that_begins_to_rewrite_later_is_refused_at_that_turn(tokenizer):
    tokenizer.chat_template = "{% if messages | length > 4 %}{{ 'Long ago. ' }}{% endif %}" + CHATML
    template = Template(tokenizer, system=None)
    talk = [Message(role="user", content="Anna"), Message(role="assistant", content="Turin")]
    template.opening(talk, "And?")
    with pytest.raises(ModelError, match="rewrites old turns when one is added"):
        template.opening([*talk, *talk], "And?")


def test_a_template_without_a_system_role_says_what_to_leave_away(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    Template(tokenizer, system=None)
    with pytest.raises(ModelError, match=r"\(no system role\); leave the system prompt away"):
        Template(tokenizer, system="You answer briefly.")


def test_the_pinned_tokens_are_those_before_what_the_user_says(tokenizer):
    template = Template(tokenizer, system="You answer briefly.")
    kept = tokenizer.decode(template.opening(template.beginning, "Who?")[: template.pinned()])
    assert kept.strip() == "<|bos|><|system|> You answer briefly.<|end|><|user|>"


def test_without_a_template_replies_are_lines(make_model, tokenizer):
    tokenizer.chat_template = None
    chat = Chat(make_model(), tokenizer, "full", system="Be brief.", generation=GenerationConfig(max_new_tokens=12))
    replies = ["".join(chat.send(text)) for text in ("Anna?", "Turin?")]
    written = tokenizer.decode(chat.ids, skip_special_tokens=True)
    assert written.startswith("Be brief.\n\nUser: Anna?\nAssistant:")
    assert written.count("\nUser: Turin?\nAssistant:") == 1
    assert written.endswith("\n")
    assert all("\n" not in reply for reply in replies)


def test_without_a_template_a_line_break_inside_a_token_ends_the_reply_before_it(model, tokenizer, monkeypatch):
    tokenizer.chat_template = None
    chat = Chat(model, tokenizer, "full", generation=GenerationConfig(max_new_tokens=12, eos_token_id=[]))
    wanted = tokenizer.encode("She lives", add_special_tokens=False)
    line = tokenizer.convert_tokens_to_ids("Ċ")
    monkeypatch.setattr("kvfold.chat.chat.stream", lambda *_, **__: speak(chat, [*wanted, line]))
    assert "".join(chat.send("Anna?")) == "She lives"
    assert tokenizer.decode(chat.ids[chat.turns[0].reply :]) == "She lives\n"


def speak(chat, tokens):
    """What the stream gives when the model says these tokens: all but the last are fed."""
    from kvfold.hf.generation import feed

    prompt = chat._template.opening([], "Anna?")
    feed(chat.model, chat.cache, [*prompt, *tokens[:-1]])
    yield from tokens


@pytest.mark.parametrize("words", ["Anna lives in Turin.", "  two  spaces ", "naïve café — 東京 🙂 done", "🙂", ""])
def test_pieces_put_together_are_the_reply_and_no_half_character_is_given_out(tokenizer, words):
    text = Detokenizer(tokenizer)
    pieces = [text.add(token) for token in tokenizer.encode(words, add_special_tokens=False)]
    pieces.append(text.rest())
    assert "".join(pieces) == words.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
