import pytest
from strangers import stranger

from kvfold.bench.ask.prompts import expected, length, prompt, reply, shortened
from kvfold.errors import SuiteError

TEXT, QUESTION = "The sea is blue. The sky is grey. What is blue?", "What is blue?"


def cuts(tokenizer, *, text=TEXT, seen=False, begun=""):
    made = prompt(tokenizer, text, question=QUESTION, seen=seen, reply_tokens=5, begun=begun)
    assert made.reply_tokens == 5
    return tokenizer.decode(list(made.context)), tokenizer.decode(list(made.question))


def test_an_unseen_question_comes_after_the_fold():
    assert cuts(stranger().tokenizer) == (
        "<|bos|><|user|> The sea is blue. The sky is grey.",
        " What is blue?<|end|><|assistant|>",
    )


def test_a_seen_question_is_folded_and_the_reply_begins_after_it():
    told, asked = cuts(stranger().tokenizer, seen=True)
    assert told == f"<|bos|><|user|> {TEXT}<|end|>"
    assert asked == "<|assistant|>"


@pytest.mark.parametrize("seen", [True, False])
def test_the_first_words_of_the_reply_are_put_into_its_mouth(seen):
    _, asked = cuts(stranger().tokenizer, seen=seen, begun="Answer:")
    assert asked.endswith("<|assistant|> Answer:")


@pytest.mark.parametrize("seen", [True, False])
def test_the_tokens_are_those_of_the_whole_text(seen):
    tokenizer = stranger().tokenizer
    made = prompt(tokenizer, TEXT, question=QUESTION, seen=seen, reply_tokens=1)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], add_generation_prompt=True, return_dict=False
    )
    assert [*made.context, *made.question] == whole


def test_a_question_that_stands_in_the_text_too_is_cut_where_it_stands_last():
    text = f"{QUESTION} I ask. {TEXT}"
    told, asked = cuts(stranger().tokenizer, text=text)
    assert told.endswith("The sky is grey.")
    assert asked.startswith(" What is blue?")


@pytest.mark.parametrize("seen", [True, False])
def test_without_a_template_the_text_is_plain(seen):
    told, asked = cuts(stranger(chats=False).tokenizer, seen=seen, begun="It is")
    assert told + asked == f"<|bos|>{TEXT}\nIt is"
    assert asked == ("\nIt is" if seen else " What is blue?\nIt is")


def test_a_template_that_changes_what_users_say_is_refused():
    tokenizer = type(stranger().tokenizer).from_pretrained(stranger().tokenizer.name_or_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(SuiteError, match="changes what users say"):
        cuts(tokenizer)


def test_a_template_that_adds_nothing_leaves_the_last_token_to_be_asked():
    tokenizer = type(stranger().tokenizer).from_pretrained(stranger().tokenizer.name_or_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert cuts(tokenizer, seen=True) == (TEXT[:-1], "?")


@pytest.mark.parametrize("chats", [True, False])
@pytest.mark.parametrize("begun", ["", "Answer:"])
def test_an_expected_reply_has_the_tokens_with_which_it_would_go_on(chats, begun):
    tokenizer = stranger(chats=chats).tokenizer
    tokens = expected(tokenizer, "a grey goose", begun=begun)
    assert tokenizer.decode(list(tokens)).strip() == "a grey goose"
    asked = prompt(tokenizer, TEXT, question=QUESTION, seen=False, reply_tokens=1, begun=begun).question
    both = prompt(tokenizer, TEXT, question=QUESTION, seen=False, reply_tokens=1, begun=f"{begun} a grey goose".strip())
    assert both.question == asked + tokens


def test_a_text_is_shortened_to_so_many_tokens():
    tokenizer = stranger().tokenizer
    short = shortened(tokenizer, TEXT, 5)
    assert TEXT.startswith(short)
    assert length(tokenizer, short) == 5
    assert shortened(tokenizer, TEXT, 100) == TEXT


def test_of_a_model_that_does_not_chat_the_first_line_counts():
    tokens = stranger().tokenizer(" blue\nWhat else?", add_special_tokens=False)["input_ids"]
    assert reply(stranger().tokenizer, tokens) == "blue\nWhat else?"
    assert reply(stranger(chats=False).tokenizer, tokens) == "blue"
