"""What the tests of chats stand on: small random models and a small tokenizer with a chat template.

The tokenizer is trained here on a few sentences; the models answer nonsense, which is all that is needed: what is
tested is that two ways to the same text give the same nonsense.
"""

import pytest

SENTENCES = [
    "Anna lives in Turin and has a grey cat called Pixel.",
    "Where does Anna live? She lives in Turin.",
    "The second price is 12, the first one was 7; the lamp costs 30.",
    "You answer briefly. Never say the code word.",
    "Hello there! How are you today? I am fine, thank you.",
] * 4


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
    """A fresh fast tokenizer of 300 entries, with the template that the shipped models use."""
    from transformers import AutoTokenizer

    from kvfold.data import tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(tokenizer.train(SENTENCES, vocabulary=300), folder, positions=512)
    return lambda: AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_model():
    """A random Llama, or another family's configuration of the same size."""
    import torch
    import transformers

    def make(*, family="llama", seed=0, dtype=None, positions=512, layers=2):
        torch.manual_seed(seed)
        size = {
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": positions,
            "initializer_range": 0.3,  # peaked attention: a wrong slot shows
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if family == "gemma3":
            kinds = ["sliding_attention", "full_attention"]
            config = transformers.Gemma3TextConfig(**size, sliding_window=8, layer_types=kinds * (layers // 2))
            made = transformers.Gemma3ForCausalLM(config)
        else:
            made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
        return made.to(dtype or torch.float32).eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()
