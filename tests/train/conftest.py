"""A tokenizer and a very small Llama for the tests of training."""

import pytest

from kvfold.data import tokenizer as tokenizers
from kvfold.data import training_dialogue
from kvfold.hf.load import new_llama


@pytest.fixture(scope="session")
def tokenizer():
    texts = (" " + message.content for seed in range(30) for message in training_dialogue("recall", turns=6, seed=seed))
    return tokenizers.train(texts, vocabulary=400)


@pytest.fixture
def llama():
    return new_llama(
        vocab_size=400,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
