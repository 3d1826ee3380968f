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


def prompt(
    tokenizer: Any,
    text: str,
    *,
    question: str,
    seen: bool,
    reply_tokens: int,
    begun: str = "",
) -> Prompt:
    """Encode one user message that ends with a question; the reply begins with the words `begun`.

    Raises SuiteError if the tokenizer's template changes the text.
    """
    assert text.endswith(question), "a prompt ends with its question"
    message = _message(tokenizer, text)
    whole = _with_reply(tokenizer, text, begun)
    words = text.strip()  # templates may trim
    place = message.rfind(words)
    if place < 0 or not only_adds([message, whole]):
        raise SuiteError(
            "a prompt was to be cut before its question; this tokenizer's chat template changes what users say; "
            "use a model whose template leaves it as it is"
        )
    fold = len(message)
    if not seen:
        asks = place + len(words) - len(question.rstrip())  # the character at which the question starts
        fold = len(message[:asks].rstrip())  # the space before it belongs to its first token
    tokens = TextTokens.of(tokenizer, whole)
    context, rest = tokens.cut([fold, len(whole)])
    if not rest:  # the template adds nothing after the message: the last token asks
        context, rest = context[:-1], context[-1:]
    return Prompt(context=context, question=rest, reply_tokens=reply_tokens)


def expected(tokenizer: Any, answer: str, *, begun: str = "") -> tuple[int, ...]:
    """Encode the reply that gives this answer, after the same beginning."""
    asked = _with_reply(tokenizer, "Well?", begun)
    answered = _with_reply(tokenizer, "Well?", f"{begun} {answer}".strip())
    if not only_adds([asked, answered]):  # a template that begins replies with, say, a place to think
        return TextTokens.of(tokenizer, answer).ids
    tokens = TextTokens.of(tokenizer, answered)
    _, reply_ids = tokens.cut([len(asked), len(answered)])
    return reply_ids


def length(tokenizer: Any, text: str) -> int:
    """Count the tokens of a text."""
    return len(TextTokens.of(tokenizer, text).ids)


def shortened(tokenizer: Any, text: str, tokens: int) -> str:
    """Cut a text down to its first `tokens` tokens."""
    ends = TextTokens.of(tokenizer, text).ends
    if len(ends) <= tokens:
        return text
    return text[: ends[tokens - 1]]


def reply(tokenizer: Any, tokens: list[int]) -> str:
    """Decode what a model said. A base model does not know when to stop, so only its first line counts."""
    said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    if tokenizer.chat_template:
        return said
    return said.split("\n")[0]


def _message(tokenizer: Any, text: str) -> str:
    """Write the user's message alone."""
    return render(tokenizer, [Message(role="user", content=text)], template=_form(tokenizer))


def _with_reply(tokenizer: Any, text: str, begun: str) -> str:
    """Write the user's message and the beginning of the reply."""
    messages = [Message(role="user", content=text)]
    if not begun:
        return render(tokenizer, messages, template=_form(tokenizer), opens_reply=True)
    messages.append(Message(role="assistant", content=begun))
    return render(tokenizer, messages, template=_form(tokenizer), unfinished=True)


def _form(tokenizer: Any) -> str | None:
    """Choose the template: the tokenizer's (None), or the contents alone for a base model."""
    return None if tokenizer.chat_template else PLAIN_CONTENTS
