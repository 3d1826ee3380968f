"""Recall: facts about people, told in some turns, changed in others, asked many turns later.

A key is a person and a kind; at least two people hold each kind that is asked. Every telling names person and kind
before the value, and the reply says all three again.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.data import frames
from kvfold.data.dialogue import Judge, Question, Tell
from kvfold.data.words import KINDS, Words

TELLS = {
    "train": (
        "{name}'s {kind} {verb} {value}.",
        "{name}'s {kind} {verb} {value}.",
        "The {kind} of {name} {verb} {value}.",
        "As for {name}, the {kind} {verb} {value}.",
        "About {name}: the {kind} {verb} {value}.",
        "I know that {name}'s {kind} {verb} {value}.",
        "You should know the {kind} of {name} {verb} {value}.",
        "Please remember that {name}'s {kind} {verb} {value}.",
        "For {name} the {kind} {verb} {value}.",
        "Speaking of {name}, {name}'s {kind} {verb} {value}.",
        "When you think of {name}, the {kind} {verb} {value}.",
        "{name}: the {kind} {verb} {value}.",
        "Of {name} I know the {kind} {verb} {value}.",
        "With {name} it is like this, the {kind} {verb} {value}.",
        "Never forget that the {kind} of {name} {verb} {value}.",
    ),
    "heldout": (
        "I should say that {name}'s {kind} {verb} {value}.",
        "Remember, the {kind} of {name} {verb} {value}.",
        "You know, for {name} the {kind} {verb} {value}.",
        "Speaking of {name}, the {kind} {verb} {value}.",
        "Please know: {name}'s {kind} {verb} {value}.",
    ),
}
CHANGES = {
    "train": ("Actually, ", "News: ", "There was a change: ", "I was wrong before: ", "", "It changed: "),
    "heldout": ("A change: ", "Actually, there is news: ", "I was wrong: "),
}
ASKS = {
    "train": (
        "What is {name}'s {kind}?",
        "What is the {kind} of {name}?",
        "For {name}, what is the {kind}?",
        "What {kind} does {name} have?",
        "Which {kind} is the one of {name}?",
        "{name}: what is the {kind}?",
        "The {kind} of {name}, what is it?",
        "Can you tell me {name}'s {kind}?",
        "Of {name} I need the {kind}.",
        "I need to hear {name}'s {kind}.",
        "Is there a {kind} of {name} that I told you?",
        "Say what {name}'s {kind} is.",
        "Give me {name}'s {kind}.",
        "Do you remember {name}'s {kind}?",
        "Tell me the {kind} of {name}.",
        "And {name}, what is the {kind}?",
        "Please tell me {name}'s {kind} again.",
        "I want to know the {kind} of {name} now.",
        "I forgot {name}'s {kind}.",
        "Now I need {name}'s {kind}.",
        "Do you still have {name}'s {kind}?",
        "Now say the {kind} of {name}.",
        "I do not know {name}'s {kind} any more.",
        "About {name}, what is the {kind}?",
        "Remind me: what is {name}'s {kind}?",
        "Remember {name}: what is the {kind}?",
        "Of {name}, tell me the {kind}.",
    ),
    "heldout": (
        "Do you know the {kind} of {name}?",
        "I forgot, what is {name}'s {kind}?",
        "Please remember: what is the {kind} of {name}?",
        "About {name}, tell me the {kind}.",
        "Now tell me {name}'s {kind}, please.",
    ),
}


def told(rng: random.Random, split: str, *, name: str, kind: str, value: str, change: bool) -> str:
    """One sentence that tells a fact, or its new value."""
    text = rng.choice(TELLS[split]).format(name=name, kind=kind, value=value, verb="is now" if change else "is")
    if not change:
        return frames.tell(rng, split, text)
    prefix = rng.choice(CHANGES[split])
    if not prefix:
        return frames.tell(rng, split, text)
    if not text.startswith(name):
        text = text[0].lower() + text[1:] if not text.startswith("I ") else text
    return prefix + text


def asked(rng: random.Random, split: str, *, name: str, kind: str) -> str:
    """One sentence that asks for a fact."""
    return frames.ask(rng, split, rng.choice(ASKS[split]).format(name=name, kind=kind))


def replied(name: str, kind: str, value: str) -> str:
    """The canonical reply about a fact."""
    return f"{name}'s {kind} is {value}."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fact:
    name: str
    kind: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallScene:
    """People, kinds and values, with some of them changed later."""

    split: str
    facts: tuple[_Fact, ...]
    tells: Sequence[Tell]

    def ask(self, rng: random.Random, told: int) -> Question | None:
        """Ask for a kind that at least two people hold by now."""
        alive: dict[tuple[str, str], str] = {}
        for fact in self.facts[:told]:
            alive.pop((fact.name, fact.kind), None)
            alive[fact.name, fact.kind] = fact.value
        kinds = [kind for _, kind in alive]
        keys = [key for key in alive if kinds.count(key[1]) >= 2]
        if not keys:
            return None
        name, kind = rng.choice(keys)
        value = alive[name, kind]
        holders = [alive[key] for key in alive if key[1] == kind]
        rivals = {fact.value for fact in self.facts[:told] if fact.kind == kind} - {value}
        return Question(
            text=asked(rng, self.split, name=name, kind=kind),
            reply=replied(name, kind, value),
            judge=Judge(how="value", answer=value, rivals=tuple(sorted(rivals))),
            keys=(f"{name}/{kind}",),
            holders=len(holders),
            newest=holders[-1],
            guess=rng.choice(holders),
        )


def scene(rng: random.Random, words: Words, *, size: int) -> RecallScene:
    """`size` facts (and about a third as many changes) over two to four people and one to three kinds."""
    people = max(2, min(4, round(size**0.5 + rng.random() * 0.8)))
    kinds = rng.sample(KINDS, max(1, min(3, size // people)))
    names = words.distinct(lambda: words.name(rng, rng.choice(("woman", "man"))), people)
    pairs = [(name, kind) for kind in kinds for name in names]
    rng.shuffle(pairs)
    changes = [pair for pair in pairs if size > 2 and rng.random() < 0.35]
    order = pairs + changes
    spread = len(pairs) // 2
    later = order[spread:]
    rng.shuffle(later)
    values = {kind: words.distinct(lambda kind=kind: words.value(rng, kind), len(order)) for kind in kinds}
    facts, tells, seen = [], [], set()
    for name, kind in order[:spread] + later:
        fact = _Fact(name=name, kind=kind, value=values[kind].pop())
        change = (name, kind) in seen
        seen.add((name, kind))
        text = told(rng, words.split, name=name, kind=kind, value=fact.value, change=change)
        facts.append(fact)
        tells.append(Tell(text=text, keys=(f"{name}/{kind}",)))
    return RecallScene(split=words.split, facts=tuple(facts), tells=tuple(tells))
