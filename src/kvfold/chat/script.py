"""A scripted dialogue as chunks of tokens: one chunk per finished turn, then the question that is asked.

The text is what the tokenizer's own chat template makes of the whole dialogue, and its tokens are those of the whole
text, cut where turns end; so the model reads what it would read without any cache. It knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvfold.data import Message
from kvfold.errors import SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What is fed, turn by turn, and what is asked at the end."""

    turns: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]  # ends where the model's reply begins


def script(tokenizer: Any, messages: Sequence[Message]) -> Script:
    """Cut a dialogue that ends with a user's message. Raises SuiteError where the template cannot be cut."""
    assert messages[-1].role == "user", "a script ends with a question"
    ends = [i + 1 for i, message in enumerate(messages[:-1]) if message.role == "assistant"]
    texts = [render(tokenizer, messages[:end]) for end in ends] + [render(tokenizer, messages, ask=True)]
    for shorter, longer in pairwise(texts):
        if not longer.startswith(shorter):
            raise SuiteError(
                "a dialogue was to be fed turn by turn; this tokenizer's chat template changes old turns when one is "
                "added; use a model whose template leaves them as they are"
            )
    chunks = cut(tokenizer, texts[-1], [len(text) for text in texts])
    return Script(turns=tuple(chunks[:-1]), question=chunks[-1])


def render(tokenizer: Any, messages: Sequence[Message], *, ask: bool = False) -> str:
    """Messages as the tokenizer's chat template writes them, with `ask` opened for a reply."""
    if not tokenizer.chat_template:
        raise SuiteError(
            "a chat suite was asked for; this model's tokenizer has no chat template; use a model made for chat"
        )
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=ask)


def cut(tokenizer: Any, text: str, ends: Sequence[int]) -> list[tuple[int, ...]]:
    """The tokens of a text in pieces that end at these characters; a token across an end belongs to the later piece."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces: list[list[int]] = [[] for _ in ends]
    piece = 0
    for token, (_, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
        while end > ends[piece]:
            piece += 1
        pieces[piece].append(token)
    return [tuple(tokens) for tokens in pieces]
