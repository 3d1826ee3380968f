from itertools import pairwise

import pytest
from strangers import stranger

from kvfold.bench.ask.transcript import transcript
from kvfold.data import Message
from kvfold.errors import ModelError, SuiteError

SAID = [
    ("user", " Where is Anna? "),
    ("assistant", "Anna is in Turin."),
    ("user", "Sure?"),
    ("assistant", "Turin, yes."),
]
MESSAGES = [Message(role=role, content=content) for role, content in SAID]
TOKENIZER = stranger().tokenizer


def text_of(read, tokens):
    return TOKENIZER.decode([read.tokens[i] for i in tokens], skip_special_tokens=False)


@pytest.mark.parametrize("form", ["template", "plain"])
def test_turns_make_up_the_whole_and_replies_end_them(form):
    read = transcript(TOKENIZER, MESSAGES, form=form)
    assert read.turns[0].start == 0
    assert all(one.stop == two.start for one, two in pairwise(read.turns))
    assert read.turns[-1].stop == len(read.tokens)
    assert [reply.stop for reply in read.replies] == [turn.stop for turn in read.turns]
    assert text_of(read, read.replies[0]).strip().startswith("Anna is in Turin.")
    assert "Sure?" in text_of(read, read.turns[1])
    assert "Turin, yes." in text_of(read, read.replies[1])
    assert "Sure" not in text_of(read, read.replies[1])


def test_the_template_is_the_tokenizers_own():
    read = transcript(TOKENIZER, MESSAGES)
    plain = [{"role": role, "content": content} for role, content in SAID]
    assert (
        list(read.tokens)
        == TOKENIZER(TOKENIZER.apply_chat_template(plain, tokenize=False), add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("form", ["template", "plain"])
def test_a_stretch_is_the_tokens_that_say_it(form):
    read = transcript(TOKENIZER, MESSAGES, form=form)
    for message, (_, content) in enumerate(SAID):
        for word in ("Anna", "Turin", "Sure"):
            if word in content:
                tokens = read.stretch(message, content.index(word), content.index(word) + len(word))
                assert text_of(read, tokens).strip(" .,?") == word
                assert word not in text_of(read, [i for i in read.turns[message // 2] if i not in tokens][-3:])


def test_a_tokenizer_without_a_template_gets_plain_lines():
    bare = stranger(chats=False).tokenizer
    read = transcript(bare, MESSAGES)
    assert read == transcript(TOKENIZER, MESSAGES, form="plain")
    assert "user: Where is Anna?\nassistant: Anna is in Turin.\n" in text_of(read, read.turns[0])


def test_a_template_that_changes_old_turns_is_refused():
    class Fickle:
        is_fast, chat_template = True, "yes"

        def apply_chat_template(self, messages, **settings):
            return f"{len(messages)} messages: " + " ".join(one["content"] for one in messages)

    with pytest.raises(SuiteError, match="changes old turns"):
        transcript(Fickle(), MESSAGES)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast, chat_template = False, "yes"

        def apply_chat_template(self, messages, **settings):
            return " ".join(one["content"] for one in messages)

    with pytest.raises(ModelError, match="fast tokenizer"):
        transcript(Slow(), MESSAGES)
