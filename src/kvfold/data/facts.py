"""Documents with facts in them, each asked for by a question of its own: several questions on one text.

Facts and questions are worded as RULER's needles, which small models can answer: https://arxiv.org/abs/2404.06654
Ours differs: a document is read once and asked several times, so that it can be folded before any question is known.
"""

import random
from dataclasses import dataclass

from kvfold.data.excerpts import Source
from kvfold.data.ruler import Count, filled, hide, running_text, seven_digits, word_pair
from kvfold.errors import DataError

HEAD = "Some special magic numbers are hidden within the following text. I will ask about them afterwards."


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One fact of a document, with the question for it and how a reply begins."""

    question: str
    begun: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, and the facts in it in the order in which they are asked."""

    text: str
    facts: tuple[Fact, ...]


def document(*, tokens: int, facts: int, count: Count, seed: int) -> Document:
    """Write a document of about `tokens` tokens, as `count` counts them. Raises DataError where facts do not fit."""
    rng = random.Random(f"facts:{tokens}:{facts}:{seed}")
    numbers: dict[str, str] = {}
    while len(numbers) < facts:
        numbers.setdefault(word_pair(rng), seven_digits(rng))
    hidden = [f"One of the special magic numbers for {key} is: {number}." for key, number in numbers.items()]
    left = tokens - count(" ".join((HEAD, *hidden)))
    if left < 0:
        raise DataError(f"{facts} facts were asked for in {tokens} tokens; they take {tokens - left}; give more tokens")
    hay = filled(running_text(rng, Source()), tokens=left, count=count, glue=" ")
    asked = []
    for key, number in rng.sample(sorted(numbers.items()), facts):
        about = f"for {key} mentioned in the provided text"
        question = f"What is the special magic number {about}?"
        asked.append(Fact(question=question, begun=f"The special magic number {about} is", answer=number))
    return Document(text=f"{HEAD}\n{hide(rng, hay, hidden, glue=' ')}", facts=tuple(asked))
