"""A prompt with its question at the end, as tokens: what is folded, and what is asked of what was kept.

The question is folded with the rest (seen) or comes after the fold (unseen). The text is what the tokenizer's chat
template makes of one user message; a tokenizer without one gets the plain text, so that base models can be asked too.
Its tokens are those of the whole text, cut where the fold is. It knows no model.
"""

from dataclasses import dataclass
from typing import Any

from kvfold.chat.script import cut
from kvfold.errors import SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is fed and folded, and what is asked then."""

    context: tuple[int, ...]
    question: tuple[int, ...]  # never empty; ends where the reply goes on
    reply_tokens: int  # how long the reply may be


def prompt(tokenizer: Any, text: str, *, question: str, seen: bool, reply_tokens: int, begun: str = "") -> Prompt:
    """One user message that ends with a question; `begun` are the first words of the reply, put into its mouth.

    Raises SuiteError where the tokenizer's template does not leave the text as it is.
    """
    assert text.endswith(question), "a prompt ends with its question"
    told, asked = _render(tokenizer, text, begun)
    place = told.rfind(text.strip())
    if place < 0 or not asked.startswith(told):
        raise SuiteError(
            "a prompt was to be cut before its question; this tokenizer's chat template changes what users say; "
            "use a model whose template leaves it as it is"
        )
    fold = len(told) if seen else len(told[: place + len(text.strip()) - len(question.rstrip())].rstrip())
    context, rest = cut(tokenizer, asked, [fold, len(asked)])
    if not rest:
        context, rest = context[:-1], context[-1:]
    return Prompt(context=context, question=rest, reply_tokens=reply_tokens)


def expected(tokenizer: Any, answer: str, *, begun: str = "") -> tuple[int, ...]:
    """The tokens of a reply that says this, after the same beginning."""
    _, asked = _render(tokenizer, "Well?", begun)
    _, whole = _render(tokenizer, "Well?", f"{begun} {answer}".strip())
    if not whole.startswith(asked):  # a template that begins replies in its own way, with a place to think, say
        return tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return cut(tokenizer, whole, [len(asked), len(whole)])[1]


def length(tokenizer: Any, text: str) -> int:
    """How many tokens a text takes."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def shortened(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of a text, at most so many tokens of it."""
    ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(ends) <= tokens else text[: ends[tokens - 1][1]]


def reply(tokenizer: Any, tokens: list[int]) -> str:
    """What a model said. One that was not made for chat does not know when to stop: its first line counts."""
    said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return said if tokenizer.chat_template else said.split("\n")[0]


def _render(tokenizer: Any, text: str, begun: str) -> tuple[str, str]:
    """The message alone, and with the beginning of the reply."""
    if not tokenizer.chat_template:
        return (tokenizer.bos_token or "") + text, (tokenizer.bos_token or "") + text + "\n" + begun
    messages = [{"role": "user", "content": text}]
    told = tokenizer.apply_chat_template(messages, tokenize=False)
    if not begun:
        return told, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": begun})
    return told, tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
