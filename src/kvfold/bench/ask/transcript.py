"""A finished dialogue as tokens: the tokens of each turn, of its reply, and of any stretch of a message.

The tokenizer's chat template writes the whole dialogue; a tokenizer without one gets plain lines `role: content`. The
tokens of that text are cut where turns end, so the model reads what it would read without any cache. This file knows
no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvfold.chat.template import PLAIN_LINES, only_adds, render
from kvfold.chat.tokens import TextTokens
from kvfold.data import Message
from kvfold.errors import SuiteError

Form = Literal["template", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """All tokens of a dialogue, and the places of its parts among them."""

    text: TextTokens
    turns: tuple[range, ...]  # each ends with a reply and what closes it
    replies: tuple[range, ...]  # one a turn: the words of the reply and what closes it
    contents: tuple[int, ...]  # characters at which the contents of the messages start

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the whole dialogue."""
        return self.text.ids

    def stretch(self, message: int, start: int, end: int) -> range:
        """Find the tokens that say these characters of a message's content, wholly or in part."""
        first = self.contents[message]
        return self.text.between(first + start, first + end)


def transcript(tokenizer: Any, messages: Sequence[Message], *, form: Form = "template") -> Transcript:
    """Read a dialogue of finished turns. Raises SuiteError if the template cannot be cut into them."""
    assert messages[-1].role == "assistant", "a transcript ends with a reply"
    texts = [_written(tokenizer, messages[:count], form) for count in range(len(messages) + 1)]
    contents = _contents(messages, texts)
    tokens = TextTokens.of(tokenizer, texts[-1])
    turns: list[range] = []
    replies: list[range] = []
    for place, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = turns[-1].stop if turns else 0
        stop = tokens.until(len(texts[place + 1]))
        turns.append(range(start, stop))
        replies.append(range(tokens.until(contents[place]), stop))
    return Transcript(text=tokens, turns=tuple(turns), replies=tuple(replies), contents=contents)


def _written(tokenizer: Any, messages: Sequence[Message], form: Form) -> str:
    """The dialogue as text, empty before the first message."""
    if not messages:
        return ""
    if form == "template" and tokenizer.chat_template:
        return render(tokenizer, messages)
    lines = [Message(role=message.role, content=message.content.strip()) for message in messages]
    return (tokenizer.bos_token or "") + render(tokenizer, lines, template=PLAIN_LINES)


def _contents(messages: Sequence[Message], texts: Sequence[str]) -> tuple[int, ...]:
    """Find the characters at which the contents start. `texts[k]` are the first k messages as text."""
    places = []
    for message, before, after in zip(messages, texts[:-1], texts[1:], strict=True):
        place = after.find(message.content.strip(), len(before))
        if place < 0 or not only_adds([before, after]):
            raise SuiteError(
                "a dialogue was to be read turn by turn; this tokenizer's chat template changes old turns when one is "
                "added, or what was said; give --set form=plain"
            )
        # Templates may trim: the place counts from where the content would start with its leading space.
        leading = len(message.content) - len(message.content.lstrip())
        places.append(place - leading)
    return tuple(places)
