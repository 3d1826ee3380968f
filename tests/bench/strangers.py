"""A model that knows nothing, with the shipped tokenizer or none of its template: whom the suites are tested on.

Its weights are larger than a fresh model's, so that what it says depends on what it read.
"""

from functools import cache

import torch
from transformers import AutoTokenizer

import fakes
from kvfold.bench.subject import Subject
from kvfold.hf.load import SHIPPED, new_llama


@cache
def stranger(*, chats: bool = True, slides: bool = False, positions: int = 4096) -> Subject:
    """The subject; `chats`: its tokenizer has a chat template; `slides`: some of its layers see a window only."""
    tokenizer = AutoTokenizer.from_pretrained(str(SHIPPED / "tiny"))
    if not chats:
        tokenizer.chat_template = None
    model = fakes.fresh("gemma3", vocab_size=len(tokenizer)) if slides else _llama(len(tokenizer), positions)
    return Subject(name="stranger", model=model, tokenizer=tokenizer, fingerprint="0", dtype="float32", device="cpu")


def _llama(vocabulary: int, positions: int):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return new_llama(
            **sizes,
            num_key_value_heads=2,
            vocab_size=vocabulary,
            max_position_embeddings=positions,
            initializer_range=0.3,
        ).eval()
