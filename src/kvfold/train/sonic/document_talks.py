"""A document that is folded as a whole, then questions about it with their replies, as a talk to learn from.

The document stands at the start of the first user message, and the cut comes before the first question. It does not
know where questions and replies come from.
"""

from collections.abc import Sequence
from typing import Any

from kvfold.chat.template import render
from kvfold.chat.tokens import TextTokens
from kvfold.data import Message
from kvfold.train.sonic.talk_batch import Talk


def document_talk(tokenizer: Any, document: str, messages: Sequence[Message], *, weight: float) -> Talk:
    """Make a talk of these messages, user and assistant in turn, whose one folded segment ends with the document.

    Each token of a reply counts `weight`.
    """
    text = render(tokenizer, messages)
    bounds = [text.index(document) + len(document)]
    for index in range(1, len(messages), 2):
        asked = render(tokenizer, messages[:index], opens_reply=True)
        answered = render(tokenizer, messages[: index + 1])
        bounds += [len(asked), len(answered)]
    ids: list[int] = []
    weights: list[float] = []
    pieces = TextTokens.of(tokenizer, text).cut(bounds)
    for place, piece in enumerate(pieces):
        # The document comes first; then questions and replies take turns.
        is_reply = place > 0 and place % 2 == 0
        ids += piece
        weights += [weight if is_reply else 0.0] * len(piece)
    return Talk(ids=ids, weights=weights, ends=[len(pieces[0])])
