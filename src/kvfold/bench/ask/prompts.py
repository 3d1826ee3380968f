"""A prompt that ends with its question, as tokens: the part that is folded, and the part that comes after the fold.

The question is folded with the rest (seen) or comes after the fold (unseen). The tokenizer's chat template writes the
prompt as one user message; a tokenizer without one gets the plain text, so that base models can be asked too. The
tokens of the whole text are cut where the fold is. This file knows no model.
"""

from dataclasses import dataclass
from typing import Any

from kvfold.chat.template import PLAIN_CONTENTS, only_adds, render
from kvfold.chat.tokens import TextTokens
from kvfold.data import Message
from kvfold.errors import SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The tokens that are fed and folded, and those that come after the fold."""

    context: tuple[int, ...]
    question: tuple[int, ...]  # never empty; ends where the model goes on
    reply_tokens: int  # the longest reply


def prompt(tokenizer: Any, text: str, *, question: str, seen: bool, reply_tokens: int, begun: str = "") -> Prompt:
    """Encode one user message that ends with a question; the reply begins with the words `begun`.

    Raises SuiteError if the tokenizer's template changes the text.
    """
    assert text.endswith(question), "a prompt ends with its question"
    message, asked = _written(tokenizer, text, begun)
    place = message.rfind(text.strip())
    if place < 0 or not only_adds([message, asked]):
        raise SuiteError(
            "a prompt was to be cut before its question; this tokenizer's chat template changes what users say; "
            "use a model whose template leaves it as it is"
        )
    before_question = message[: place + len(text.strip()) - len(question.rstrip())].rstrip()
    fold = len(message) if seen else len(before_question)
    context, rest = TextTokens.of(tokenizer, asked).cut([fold, len(asked)])
    if not rest:  # the template adds nothing after the message: the last token asks
        context, rest = context[:-1], context[-1:]
    return Prompt(context=context, question=rest, reply_tokens=reply_tokens)


def expected(tokenizer: Any, answer: str, *, begun: str = "") -> tuple[int, ...]:
    """Encode the reply that gives this answer, after the same beginning."""
    _, asked = _written(tokenizer, "Well?", begun)
    _, whole = _written(tokenizer, "Well?", f"{begun} {answer}".strip())
    if not only_adds([asked, whole]):  # a template that begins replies with, say, a place to think
        return TextTokens.of(tokenizer, answer).ids
    return TextTokens.of(tokenizer, whole).cut([len(asked), len(whole)])[1]


def length(tokenizer: Any, text: str) -> int:
    """Count the tokens of a text."""
    return len(TextTokens.of(tokenizer, text).ids)


def shortened(tokenizer: Any, text: str, tokens: int) -> str:
    """Cut a text down to its first `tokens` tokens."""
    ends = TextTokens.of(tokenizer, text).ends
    return text if len(ends) <= tokens else text[: ends[tokens - 1]]


def reply(tokenizer: Any, tokens: list[int]) -> str:
    """Decode what a model said. A base model does not know when to stop, so only its first line counts."""
    said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return said if tokenizer.chat_template else said.split("\n")[0]


def _written(tokenizer: Any, text: str, begun: str) -> tuple[str, str]:
    """The message alone, and the message with the beginning of the reply."""
    template = None if tokenizer.chat_template else PLAIN_CONTENTS
    messages = [Message(role="user", content=text)]
    message = render(tokenizer, messages, template=template)
    if not begun:
        return message, render(tokenizer, messages, template=template, opens_reply=True)
    messages.append(Message(role="assistant", content=begun))
    return message, render(tokenizer, messages, template=template, unfinished=True)
