"""A scripted dialogue as chunks of tokens: one chunk for each finished turn, then the question at the end.

The tokenizer's chat template writes the whole dialogue, and the tokens of that text are cut where turns end. So the
model reads what it would read without any cache. This file knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.chat.template import only_adds, render
from kvfold.chat.tokens import TextTokens
from kvfold.data import Message
from kvfold.errors import SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """The tokens that are fed turn by turn, and those of the question at the end."""

    turns: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]  # ends where the model's reply begins


def script(tokenizer: Any, messages: Sequence[Message]) -> Script:
    """Cut a dialogue that ends with a user's message. Raises SuiteError if the template changes old turns."""
    assert messages[-1].role == "user", "a script ends with a question"
    stops = [place + 1 for place, message in enumerate(messages) if message.role == "assistant"]
    texts = [render(tokenizer, messages[:stop]) for stop in stops]
    texts.append(render(tokenizer, messages, opens_reply=True))
    if not only_adds(texts):
        raise SuiteError(
            "a dialogue was to be fed turn by turn; this tokenizer's chat template changes old turns when one is "
            "added; use a model whose template leaves them as they are"
        )
    *turns, question = TextTokens.of(tokenizer, texts[-1]).cut([len(text) for text in texts])
    return Script(turns=tuple(turns), question=question)
