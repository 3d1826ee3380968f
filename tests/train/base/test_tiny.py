"""The shipped model: small, stock, with a tokenizer that keeps every text and a card that is its record."""

import json

import pytest
import torch

from kvfold.data import best_shortcut, dialogue
from kvfold.data import tokenizer as tokenizers
from kvfold.hf.load import SHIPPED, load
from kvfold.train.base.score import Answerer, prompt

FOLDER = SHIPPED / "tiny"


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    model, _ = load("tiny", dtype=torch.float32)
    return Answerer(model, tokenizers.load(FOLDER))


def test_the_files_take_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16 * 2**20


def test_it_is_a_stock_llama_with_grouped_queries_in_bfloat16():
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 8192
    assert config["dtype"] == "bfloat16"


def test_its_tokenizer_keeps_every_text():
    tokenizer = tokenizers.load(FOLDER)
    for text in ("Anna's job is silver baker.", " two  spaces\n", "Ünïcödé 漢字 🙂 12.5"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_rendered_chat_opens_once():
    _, tokenizer = load("tiny")
    messages = [{"role": "user", "content": "Hello."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_the_card_tells_tokens_scores_and_licences():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("tokens", "Held-out scores", "shortcut", "Apache-2.0", "MIT", "public domain"):
        assert word in card


@pytest.mark.slow
def test_it_binds_held_out_names_to_held_out_values(answerer):
    asked = [dialogue("recall", split="heldout", turns=4, seed=seed) for seed in range(60)]
    replies = answerer.replies([prompt(one.messages) for one in asked])
    right = sum(one.correct(reply) for one, reply in zip(asked, replies, strict=True)) / len(asked)
    assert right > best_shortcut(asked)
