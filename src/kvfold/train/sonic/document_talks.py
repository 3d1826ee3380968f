"""A text that is folded as a whole, then questions about it with their replies, as a talk to learn from.

The text stands at the start of the first user message, and the cut comes before the first question. It does not know
where questions and replies come from.
"""

from collections.abc import Sequence
from typing import Any

from kvfold.chat.template import render
from kvfold.chat.tokens import TextTokens
from kvfold.data import Message
from kvfold.train.sonic.parallel_masks import Talk


def asked_about(tokenizer: Any, told: str, messages: Sequence[Message], *, weight: float) -> Talk:
    """The talk of these messages, user and assistant in turn; it folds up to the end of `told`, and each token of a
    reply counts `weight`."""
    text = render(tokenizer, messages)
    bounds = [text.index(told) + len(told)]
    for index in range(1, len(messages), 2):
        bounds += [
            len(render(tokenizer, messages[:index], opens_reply=True)),
            len(render(tokenizer, messages[: index + 1])),
        ]
    pieces = TextTokens.of(tokenizer, text).cut(bounds)
    counted = [place > 0 and place % 2 == 0 for place in range(len(pieces))]
    weights = [weight * counts for counts, piece in zip(counted, pieces, strict=True) for _ in piece]
    return Talk(ids=[token for piece in pieces for token in piece], weights=weights, ends=[len(pieces[0])])
