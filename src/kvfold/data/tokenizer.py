"""The tokenizer of the models trained here: byte-level BPE with single digits, and the chat template.

Every text round-trips. Message contents are rendered after a space, so that a word has the same token at the start of a
message and inside it; a number's first digit carries the space before it. Old turns render the same when turns are
added. Knows nothing of transformers; writes its files.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SPECIALS = (PAD, BOS, END, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + (message['content'] | trim) + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train(texts: Iterable[str], *, vocabulary: int) -> Tokenizer:
    """A tokenizer of `vocabulary` entries, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, *, positions: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    """The tokenizer saved in a folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that every tokenizer made here has."""
    number = tokenizer.token_to_id(token)
    assert number is not None, f"a tokenizer without {token} was made elsewhere"
    return number


def rendered(role: str, content: str) -> str:
    """One message as the chat template writes it, for training without the template engine."""
    return f"<|{role}|> {content.strip()}{END}"
