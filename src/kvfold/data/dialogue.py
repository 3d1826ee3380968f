"""A generated dialogue, what counts as a right answer to it, and the pieces it is built from.

A turn is one user message and one reply. A *scene* is the little world behind a dialogue: tells in order, and questions
that can be asked once they were told. Knows nothing of the families' language, and nothing of tokens.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, runtime_checkable

_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message; `weight` is its share in the training loss, 0 for text that is only read."""

    role: str  # "system", "user" or "assistant"
    content: str
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Decides whether a reply is right; says nothing about style beyond what the family asks."""

    how: str  # "value", "amount", "exact", "capitals", "begins", "ends"
    answer: str  # what must be said
    rivals: tuple[str, ...] = ()  # what must not be said
    topic: str = ""  # a word that a styled reply must hold

    def right(self, reply: str) -> bool:
        """Whether the reply says what must be said, and none of its rivals."""
        if self.how == "value":
            words = plain(reply)
            return says(words, self.answer) and not any(says(words, rival) for rival in self.rivals)
        if self.how == "amount":
            numbers = re.findall(r"\d+", reply)
            return bool(numbers) and int(numbers[-1]) == int(self.answer)
        if self.how == "exact":
            return plain(reply) == plain(self.answer)
        return self._styled(reply.strip().rstrip("."))

    def _styled(self, reply: str) -> bool:
        if not says(plain(reply), self.topic):
            return False
        if self.how == "capitals":
            return reply.upper() == reply
        if reply.upper() == reply:
            return False
        words, asked = plain(reply).split(), plain(self.answer).split()
        found = words[: len(asked)] if self.how == "begins" else words[-len(asked) :]
        return found == asked


def plain(text: str) -> str:
    """Lower case, punctuation as spaces, single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def says(words: str, phrase: str) -> bool:
    """Whether `phrase` stands in `words` (made by `plain`) as whole words."""
    return f" {plain(phrase)} " in f" {words} "


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """One sentence of the user's that makes keys known or changes them."""

    text: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question that only the binding of key to value answers: at least two keys of its kind are alive."""

    text: str
    reply: str  # the canonical full reply
    judge: Judge
    keys: tuple[str, ...]  # what must be remembered
    holders: int  # equally likely answers for one who knows the kind only
    newest: str  # the reply's value for one who takes the newest of the kind
    guess: str  # the value of one holder, drawn at random


@runtime_checkable
class Scene(Protocol):
    """A little world: what is told, in order, and what may be asked."""

    @property
    def tells(self) -> Sequence[Tell]:
        """What is told, in order."""
        ...

    def ask(self, rng: random.Random, told: int) -> Question | None:
        """A question answerable after the first `told` tells, or None while there is no collision."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A history that ends with the user's question, and what the reply to it must hold."""

    family: str
    messages: tuple[Message, ...]
    answer: str  # the value that must be said; for rules the whole reply
    reply: str  # the canonical full reply
    distance: int  # turns between the last telling and the asking
    judge: Judge
    holders: int  # keys of the asked kind (or ways to answer) that are alive
    shortcuts: Mapping[str, str] = field(default_factory=lambda: _NOTHING)  # name -> value that this shortcut would say

    def correct(self, reply: str) -> bool:
        """Whether a model's reply is right."""
        return self.judge.right(reply)
