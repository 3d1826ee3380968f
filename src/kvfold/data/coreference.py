"""Coreference: "her", "my aunt", "the second city", "that city", resolved turns after they were introduced.

Three kinds of scene: relatives (a relation or a pronoun stands for a name), lists (an ordinal stands for an item) and
places (a person's city stands for the city, which has facts too). Replies name what was meant, then answer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.data import frames, recall
from kvfold.data.dialogue import Judge, Question, Scene, Tell
from kvfold.data.words import KINDS, Words

FEMALE = ("sister", "aunt", "mother", "daughter", "niece", "grandmother")
MALE = ("brother", "uncle", "father", "son", "nephew", "grandfather")
ORDINALS = ("first", "second", "third", "fourth")
PLURALS = {"job": "jobs", "city": "cities", "pet": "pets", "food": "foods", "hobby": "hobbies", "drink": "drinks"}
_COUNTS = {2: "two", 3: "three", 4: "four"}
_POSSESSIVE = {"woman": "her", "man": "his"}

INTRODUCTIONS = {
    "train": (
        "My {relation} is called {name}.",
        "My {relation} {name} came by.",
        "I met my {relation} {name} today.",
        "This is about my {relation} {name}.",
        "{name} is my {relation}.",
        "I have a {relation}, {name}.",
        "You should meet {name}, my {relation}.",
        "My {relation} has the name {name}.",
    ),
    "heldout": ("Today my {relation} {name} came by.", "I know my {relation} {name} well.", "My {relation} is {name}."),
}
RELATIVE_ASKS = {
    "train": (
        "What is my {relation}'s {kind}?",
        "Tell me my {relation}'s {kind}.",
        "What is the {kind} of my {relation}?",
        "For my {relation}, what is the {kind}?",
        "I need to hear the {kind} of my {relation}.",
        "Say what my {relation}'s {kind} is.",
        "What {kind} does my {relation} have?",
        "Do you remember my {relation}'s {kind}?",
        "I do not know my {relation}'s {kind} any more.",
        "Remind me of my {relation}'s {kind}.",
        "Do you still have the {kind} of my {relation}?",
    ),
    "heldout": ("I forgot my {relation}'s {kind}.", "Do you know the {kind} of my {relation}?"),
}
PRONOUN_ASKS = {
    "train": (
        "What is {whose} {kind}?",
        "Tell me {whose} {kind}.",
        "Do you remember {whose} {kind}?",
        "I need to hear {whose} {kind}.",
        "Say what {whose} {kind} is.",
        "Give me {whose} {kind}.",
        "And {whose} {kind}, what is it?",
        "I do not know {whose} {kind} any more.",
        "Please say what {whose} {kind} is.",
        "Remind me of {whose} {kind}.",
    ),
    "heldout": ("I forgot {whose} {kind}.", "Please tell me, what is {whose} {kind}?"),
}
LISTS = {
    "train": (
        "I have {count} {plural}: {items}.",
        "Here are {count} {plural}: {items}.",
        "Please remember {count} {plural}: {items}.",
    ),
    "heldout": ("These are my {count} {plural}: {items}.", "Now {count} {plural}, please: {items}."),
}
LIST_CHANGES = {
    "train": ("The {ordinal} {kind} is now {value}.", "Actually, the {ordinal} {kind} is now {value}."),
    "heldout": (
        "There was a change: the {ordinal} {kind} is now {value}.",
        "I was wrong, the {ordinal} {kind} is now {value}.",
    ),
}
LIST_ASKS = {
    "train": (
        "What is the {ordinal} {kind}?",
        "About the {plural}: what is the {ordinal} one?",
        "Of the {plural}, tell me the {ordinal} one.",
        "Tell me the {ordinal} {kind}.",
        "Which {kind} is the {ordinal} one?",
        "Say what the {ordinal} {kind} is.",
        "I need the {ordinal} one of the {plural}.",
        "The {ordinal} {kind}, what is it?",
        "Do you know the {ordinal} {kind}?",
        "Of the {plural}, say the {ordinal} one.",
        "I do not know the {ordinal} {kind} any more.",
        "Remind me of the {ordinal} {kind}.",
    ),
    "heldout": (
        "Do you remember the {ordinal} {kind}?",
        "About the {plural}, tell me the {ordinal} one.",
        "I forgot the {ordinal} {kind}.",
    ),
}
PLACE_ASKS = {
    "train": (
        "Think of {name}'s city. What is the {kind} of that city?",
        "{name} has a city. What is the {kind} there?",
        "What is the {kind} of the city of {name}?",
        "Where {name} is, what is the {kind}?",
        "I need the {kind} of that city, the one of {name}.",
        "In the city that is {name}'s, what is the {kind}?",
        "About {name}'s city: say what the {kind} there is.",
        "What {kind} does {name}'s city have?",
        "Remember the city of {name}: what is the {kind} there?",
        "Do you know the {kind} in the city of {name}?",
    ),
    "heldout": ("Think of the city of {name}. Tell me the {kind} there.", "What is the {kind} of {name}'s city?"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What one tell made known: the words of the reply that lead to the value, its kind and its key."""

    owner: str  # a name, an ordinal or a city; a key is owner and kind
    kind: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativesScene:
    """People told by relation and name; asked by relation or pronoun."""

    split: str
    relations: tuple[tuple[str, str], ...]  # (name, relation)
    said: tuple[_Said | None, ...]  # one per tell; None introduces a person
    tells: Sequence[Tell]

    def ask(self, rng: random.Random, told: int) -> Question | None:
        """Ask for a kind two people hold, by the relation or by "her" where only one woman is known."""
        alive, kinds = _alive(self.said[:told])
        keys = [key for key in alive if kinds.count(key[1]) >= 2]
        if not keys:
            return None
        name, kind = rng.choice(keys)
        relation = dict(self.relations)[name]
        genders = ["woman" if other in FEMALE else "man" for _, other in self.relations]
        gender = "woman" if relation in FEMALE else "man"
        if genders.count(gender) == 1 and rng.random() < 0.6:
            text = rng.choice(PRONOUN_ASKS[self.split]).format(whose=_POSSESSIVE[gender], kind=kind)
        else:
            text = rng.choice(RELATIVE_ASKS[self.split]).format(relation=relation, kind=kind)
        text = frames.ask(rng, self.split, text)
        return _question(rng, text, f"{name}'s {kind} is", alive, (name, kind), self.said[:told], (f"{name}/who",))


@dataclass(frozen=True, slots=True, kw_only=True)
class ListsScene:
    """Two lists or more; items are asked by ordinal."""

    split: str
    said: tuple[tuple[_Said, ...], ...]  # one tuple per tell
    tells: Sequence[Tell]

    def ask(self, rng: random.Random, told: int) -> Question | None:
        """Ask for one item of one list."""
        flat = [said for group in self.said[:told] for said in group]
        alive, _ = _alive(flat)
        if not alive:
            return None
        ordinal, kind = rng.choice(list(alive))
        text = rng.choice(LIST_ASKS[self.split]).format(ordinal=ordinal, kind=kind, plural=PLURALS[kind])
        text = frames.ask(rng, self.split, text)
        return _question(rng, text, f"The {ordinal} {kind} is", alive, (ordinal, kind), flat, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacesScene:
    """People's cities, and what is known of each city; asked through the person."""

    split: str
    said: tuple[_Said, ...]
    tells: Sequence[Tell]

    def ask(self, rng: random.Random, told: int) -> Question | None:
        """Ask for a fact of the city of a person: two steps, both said in the reply."""
        alive, kinds = _alive(self.said[:told])
        homes = {owner: city for (owner, kind), city in alive.items() if kind == "city"}
        keys = [
            (name, (city, kind))
            for name, city in homes.items()
            for kind in dict.fromkeys(kinds)
            if (city, kind) in alive and kinds.count(kind) >= 2
        ]
        if not keys:
            return None
        name, key = rng.choice(keys)
        text = frames.ask(rng, self.split, rng.choice(PLACE_ASKS[self.split]).format(name=name, kind=key[1]))
        lead = f"{name}'s city is {key[0]}, {key[0]}'s {key[1]} is"
        return _question(rng, text, lead, alive, key, self.said[:told], (f"{name}/city",))


def scene(rng: random.Random, words: Words, *, size: int) -> Scene:
    """One of the three kinds of scene, with about `size` tells."""
    draw = rng.random()
    if draw < 0.4:
        return relatives(rng, words, size=size)
    return lists(rng, words, size=size) if draw < 0.7 else places(rng, words, size=size)


def relatives(rng: random.Random, words: Words, *, size: int) -> RelativesScene:
    """Two to four people, introduced by relation, with one to three kinds of fact."""
    people = max(2, min(4, round(size**0.5 + rng.random() * 0.8) - 1))
    kinds = rng.sample(KINDS, max(1, min(3, (size - people) // people)))
    women = rng.choice((1, people - 1, rng.randint(0, people)))
    relations = rng.sample(FEMALE, women) + rng.sample(MALE, people - women)
    rng.shuffle(relations)
    names = _names(rng, words, relations)
    said: list[_Said | None] = []
    tells: list[Tell] = []
    for name, relation in zip(names, relations, strict=True):
        said.append(None)
        text = rng.choice(INTRODUCTIONS[words.split]).format(relation=relation, name=name)
        tells.append(Tell(text=frames.tell(rng, words.split, text), keys=(f"{name}/who",)))
    pairs = [(name, kind) for kind in kinds for name in names]
    rng.shuffle(pairs)
    pairs += [pair for pair in pairs if size > 4 and rng.random() < 0.2]
    values = {kind: words.distinct(lambda kind=kind: words.value(rng, kind), len(pairs)) for kind in kinds}
    seen: set[tuple[str, str]] = set()
    for name, kind in pairs:
        fact = _Said(owner=name, kind=kind, value=values[kind].pop())
        text = recall.told(rng, words.split, name=name, kind=kind, value=fact.value, change=(name, kind) in seen)
        seen.add((name, kind))
        said.append(fact)
        tells.append(Tell(text=text, keys=(f"{name}/{kind}",)))
    return RelativesScene(
        split=words.split,
        relations=tuple(zip(names, relations, strict=True)),
        said=tuple(said),
        tells=tuple(tells),
    )


def _names(rng: random.Random, words: Words, relations: Sequence[str]) -> list[str]:
    """A name for each relative that fits the relation's gender, all different."""
    names: list[str] = []
    while len(names) < len(relations):
        name = words.name(rng, "woman" if relations[len(names)] in FEMALE else "man")
        if name not in names:
            names.append(name)
    return names


def lists(rng: random.Random, words: Words, *, size: int) -> ListsScene:
    """Two or three lists of two to four items, and a change or two."""
    kinds = rng.sample(KINDS, 2 if size < 8 else 3)
    said: list[tuple[_Said, ...]] = []
    tells: list[Tell] = []
    for kind in kinds:
        count = rng.choice((2, 3, 3, 4)) if size > 3 else 2
        values = words.distinct(lambda kind=kind: words.value(rng, kind), count + 1)
        items = tuple(
            _Said(owner=ordinal, kind=kind, value=value)
            for ordinal, value in zip(ORDINALS, values[:count], strict=False)
        )
        told = _listed(rng, items, kind)
        text = rng.choice(LISTS[words.split]).format(count=_COUNTS[count], plural=PLURALS[kind], items=told)
        said.append(items)
        text = frames.tell(rng, words.split, text)
        tells.append(Tell(text=text, keys=tuple(f"{item.owner}/{kind}" for item in items)))
        if size > 4 and rng.random() < 0.4:
            changed = _Said(owner=rng.choice(ORDINALS[:count]), kind=kind, value=values[count])
            text = rng.choice(LIST_CHANGES[words.split]).format(ordinal=changed.owner, kind=kind, value=changed.value)
            said.append((changed,))
            tells.append(Tell(text=text, keys=(f"{changed.owner}/{kind}",)))
    return ListsScene(split=words.split, said=tuple(said), tells=tuple(tells))


def _listed(rng: random.Random, items: Sequence[_Said], kind: str) -> str:
    form = rng.choice(("the {owner} {kind} is {value}", "the {owner} is {value}", "{owner} {value}"))
    return ", ".join(form.format(owner=item.owner, kind=kind, value=item.value) for item in items)


def places(rng: random.Random, words: Words, *, size: int) -> PlacesScene:
    """Two or three people with a city each, and one or two kinds of fact for every city."""
    people = 2 if size < 6 else 3
    names = words.distinct(lambda: words.name(rng, rng.choice(("woman", "man"))), people)
    cities = words.distinct(lambda: words.noun(rng, "city"), people)
    kinds = rng.sample(("food", "drink", "pet", "hobby"), 1 if size < 8 else 2)
    said = [_Said(owner=name, kind="city", value=city) for name, city in zip(names, cities, strict=True)]
    for kind in kinds:
        values = words.distinct(lambda kind=kind: words.value(rng, kind), people)
        said += [_Said(owner=city, kind=kind, value=value) for city, value in zip(cities, values, strict=True)]
    rng.shuffle(said)
    tells = [
        Tell(
            text=recall.told(rng, words.split, name=one.owner, kind=one.kind, value=one.value, change=False),
            keys=(f"{one.owner}/{one.kind}",),
        )
        for one in said
    ]
    return PlacesScene(split=words.split, said=tuple(said), tells=tuple(tells))


def _alive(said: Sequence[_Said | None]) -> tuple[dict[tuple[str, str], str], list[str]]:
    alive: dict[tuple[str, str], str] = {}
    for one in said:
        if one is not None:
            alive.pop((one.owner, one.kind), None)
            alive[one.owner, one.kind] = one.value
    return alive, [kind for _, kind in alive]


def _question(
    rng: random.Random,
    text: str,
    lead: str,
    alive: dict[tuple[str, str], str],
    key: tuple[str, str],
    said: Sequence[_Said | None],
    also: tuple[str, ...],
) -> Question:
    """The question for one key of `alive`, with `also` the other keys that the reply needs."""
    value, kind = alive[key], key[1]
    holders = [alive[other] for other in alive if other[1] == kind]
    rivals = {one.value for one in said if one is not None and one.kind == kind} - {value}
    return Question(
        text=text,
        reply=f"{lead} {value}.",
        judge=Judge(how="value", answer=value, rivals=tuple(sorted(rivals))),
        keys=(*also, f"{key[0]}/{kind}"),
        holders=len(holders),
        newest=holders[-1],
        guess=rng.choice(holders),
    )
