"""A finished dialogue as tokens: one chunk per turn, and which tokens of the whole say a reply, or a stretch of one.

The text is what the tokenizer's chat template makes of the whole dialogue, or plain lines `role: content` for a
tokenizer without one; its tokens are those of the whole text, cut where turns end, so the model reads what it would
read without any cache. It knows no model.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from kvfold.data import Message
from kvfold.errors import SuiteError

Form = Literal["template", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """All tokens of a dialogue, and where its parts lie in them."""

    tokens: tuple[int, ...]
    turns: tuple[range, ...]  # each ends with a reply and what closes it
    replies: tuple[range, ...]  # one a turn: the words of the reply and what closes it
    starts: tuple[int, ...]  # characters at which tokens start
    ends: tuple[int, ...]
    contents: tuple[int, ...]  # characters at which the contents of the messages start

    def stretch(self, message: int, start: int, end: int) -> range:
        """The tokens that say these characters of a message's content, wholly or in part."""
        first = self.contents[message]
        return self._within(first + start, first + end)

    def _within(self, start: int, end: int) -> range:
        return range(bisect_right(self.ends, start), bisect_left(self.starts, end))


def transcript(tokenizer: Any, messages: Sequence[Message], *, form: Form = "template") -> Transcript:
    """Read a dialogue of finished turns. Raises SuiteError where the template cannot be cut into them."""
    assert messages[-1].role == "assistant", "a transcript ends with a reply"
    if not getattr(tokenizer, "is_fast", False):
        raise SuiteError(
            "a dialogue was to be cut into tokens; this tokenizer does not say where its tokens stand in the text; "
            "use a model with a fast tokenizer"
        )
    text, ends, contents = _rendered(tokenizer, messages, form)
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = read["offset_mapping"]
    token_ends = tuple(end for _, end in offsets)
    last = [i for i, message in enumerate(messages) if message.role == "assistant"]
    # A token across the end of a turn belongs to the next one: it is not known before that is.
    cuts = [0, *(bisect_right(token_ends, ends[i]) for i in last)]
    turns = tuple(range(start, stop) for start, stop in pairwise(cuts))
    replies = tuple(
        range(bisect_right(token_ends, contents[i]), turn.stop) for i, turn in zip(last, turns, strict=True)
    )
    return Transcript(
        tokens=tuple(read["input_ids"]),
        turns=turns,
        replies=replies,
        starts=tuple(start for start, _ in offsets),
        ends=token_ends,
        contents=tuple(contents),
    )


def _rendered(tokenizer: Any, messages: Sequence[Message], form: Form) -> tuple[str, list[int], list[int]]:
    """The text, where each message ends in it, and where its content starts."""
    render = _templated if form == "template" and tokenizer.chat_template else _plain
    texts = [""] + [render(tokenizer, messages[: count + 1]) for count in range(len(messages))]
    contents = []
    for message, (shorter, longer) in zip(messages, pairwise(texts), strict=True):
        place = longer.find(message.content.strip(), len(shorter))
        if place < 0 or not longer.startswith(shorter):
            raise SuiteError(
                "a dialogue was to be read turn by turn; this tokenizer's chat template changes old turns when one is "
                "added, or what was said; give --set form=plain"
            )
        contents.append(place - (len(message.content) - len(message.content.lstrip())))
    return texts[-1], [len(text) for text in texts[1:]], contents


def _templated(tokenizer: Any, messages: Sequence[Message]) -> str:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(plain, tokenize=False)


def _plain(tokenizer: Any, messages: Sequence[Message]) -> str:
    return (tokenizer.bos_token or "") + "".join(f"{one.role}: {one.content.strip()}\n" for one in messages)
