"""The tokenizer: round trips, single digits, one token for a word wherever it stands, stable old turns."""

import pytest

from kvfold.data import tokenizer as tokenizers

MESSAGES = [
    {"role": "user", "content": "The lamp costs 36."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "What does the lamp cost?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [" The lamp costs 36. Anna's lamp costs 47.", " What does the lamp cost? Noted."] * 20
    tokenizers.save(tokenizers.train(texts, vocabulary=320), folder, positions=8192)
    return folder


@pytest.mark.parametrize(
    "text", ["Plain words.", " two  spaces\n\nand\tlines ", "Ünïcödé 漢字 🙂", "12.5 and 2026", ""]
)
def test_every_text_round_trips(folder, text):
    tokenizer = tokenizers.load(folder)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_single_tokens(folder):
    assert tokenizers.load(folder).encode("2047").tokens == ["2", "0", "4", "7"]


def test_a_word_has_the_same_token_at_the_start_of_a_message(folder):
    tokenizer = tokenizers.load(folder)
    assert "ĠThe" in tokenizer.encode(tokenizers.rendered("user", "The lamp.")).tokens
    assert "ĠThe" in tokenizer.encode("What? The lamp.").tokens


def test_transformers_loads_it_with_padding_on_the_left_and_the_same_rendering(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token, tokenizer.eos_token) == (tokenizers.PAD, tokenizers.END)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ours = tokenizers.BOS + "".join(tokenizers.rendered(one["role"], one["content"]) for one in MESSAGES)
    assert text == ours + "<|assistant|>"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_old_turns_render_the_same_when_turns_are_added(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    short = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith(short)
