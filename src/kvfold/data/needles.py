"""Documents with needles: sentences to be found again among filler, in the spirit of RULER.

Kinds: one key, many keys, many values of one key, many keys asked at once, chains of variables. Keys, filler and frames
have held-out halves; numbers are drawn at random. A document is a prompt for one user message.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvfold.data import chitchat, frames
from kvfold.data.dialogue import plain, says
from kvfold.data.words import SPLITS, Words, listed
from kvfold.errors import DataError

NEEDLES = ("single", "multikey", "multivalue", "multiquery", "variable")
_FRAMES = {
    "train": (
        "The special magic number for {key} is: {value}.",
        "One of the special magic numbers for {key} is: {value}.",
        "Remember that the magic number for {key} is: {value}.",
        "The magic number for {key} is: {value}.",
        "Note the special magic number for {key} is: {value}.",
    ),
    "heldout": (
        "Know that the special magic number for {key} is: {value}.",
        "One special number, the magic number for {key} is: {value}.",
    ),
}
_ASKS = {
    "train": (
        "What is the magic number for {keys}?",
        "What is the special magic number for {keys} mentioned in the text?",
        "Which magic number is for {keys}?",
        "For {keys}, what is the magic number?",
        "Say the magic number for {keys}.",
    ),
    "heldout": ("Tell me the magic number for {keys}.", "What is the special magic number for {keys}?"),
}
_ASKS_ALL = {
    "train": ("What are all the magic numbers for {keys}?",),
    "heldout": ("Tell me all the magic numbers for {keys}.",),
}
_CHAIN_ASKS = {
    "train": ("Which variables hold {value}?",),
    "heldout": ("Tell me which variables hold {value}.",),
}
_HEADS = {
    "train": ("Some numbers are hidden in this text.", "Read this text and remember the numbers."),
    "heldout": ("Remember the numbers that are hidden in this text.",),
}
_ADJECTIVE_SHARE = 0.7
_ALIKE_SHARE = 0.6  # of training's documents, in which keys share words


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A long prompt whose last sentence asks, and the strings a right reply holds, all of them, in any order."""

    kind: str
    prompt: str
    question: str  # the last sentence of the prompt
    answers: tuple[str, ...]
    reply: str  # the canonical full reply
    rivals: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...] = ()  # (key, number) of every needle; none in chains

    def correct(self, reply: str) -> bool:
        """Whether the reply holds every answer and no other needle."""
        words = plain(reply)
        return all(says(words, answer) for answer in self.answers) and not any(
            says(words, rival) for rival in self.rivals
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hidden:
    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    reply: str
    rivals: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...] = ()


def needle(
    kind: str,
    *,
    split: str,
    tokens: int,
    count: Callable[[str], int],
    seed: int,
    filler: Sequence[str] = (),
    borrowed: Sequence[str] = (),
) -> Document:
    """A document of at most `tokens` tokens, as `count` measures them; `filler` sentences replace chit-chat.

    `borrowed` words may be keys, in training.
    """
    if kind not in NEEDLES or split not in SPLITS:
        raise DataError(
            f"needle {kind!r}, split {split!r} were asked; there are {NEEDLES} and {SPLITS}; choose from these"
        )
    rng = random.Random(f"needle:{kind}:{split}:{tokens}:{seed}")
    hidden = _hidden(rng, kind, Words(split=split, borrowed=tuple(borrowed)), room=tokens)
    head = rng.choice(_HEADS[split])
    room = tokens - count(" ".join((head, *hidden.needles, hidden.question))) - 8
    if room < 0:
        raise DataError(
            f"{tokens} tokens were asked for {kind}; the needles alone take {tokens - room}; give that many"
        )
    body = _haystack(rng, split, count, room, filler)
    for place in sorted((rng.randint(0, len(body)) for _ in hidden.needles), reverse=True):
        body.insert(place, "")
    needles = iter(hidden.needles)
    body = [text or next(needles) for text in body]
    return Document(
        kind=kind,
        prompt=" ".join((head, *body, hidden.question)),
        question=hidden.question,
        answers=hidden.answers,
        reply=hidden.reply,
        rivals=hidden.rivals,
        pairs=hidden.pairs,
    )


def next_question(document: Document, *, split: str, rng: random.Random) -> tuple[str, str]:
    """One more question about a document, with its reply: training gets much more out of a long document by many."""
    if not document.pairs:
        return document.question, document.reply
    key, _ = rng.choice(document.pairs)
    values = [value for name, value in document.pairs if name == key]
    asks = _ASKS if len(values) == 1 else _ASKS_ALL
    ask = rng.choice(asks[split]).format(keys=key)
    return frames.ask(rng, split, ask), _reply({key: values})


def _reply(values: Mapping[str, Sequence[str]]) -> str:
    """What the assistant says."""
    return " ".join(f"The magic number for {name} is: {', '.join(each)}." for name, each in values.items())


def _haystack(
    rng: random.Random,
    split: str,
    count: Callable[[str], int],
    room: int,
    filler: Sequence[str],
) -> list[str]:
    """Sentences that together take at most `room` tokens."""
    body: list[str] = []
    start = rng.randrange(len(filler)) if filler else 0
    while True:
        text = filler[(start + len(body)) % len(filler)] if filler else chitchat.sentence(rng, split)
        cost = count(f" {text}")
        if cost > room:
            return body
        room -= cost
        body.append(text)


def _hidden(rng: random.Random, kind: str, words: Words, *, room: int) -> _Hidden:
    if kind == "variable":
        return _chain(rng, words.split)
    keys = {"single": 1, "multikey": 4, "multivalue": 2, "multiquery": 4}[kind]
    if kind == "multikey" and room >= 1024:
        keys = rng.randint(4, 8)
    alike = _alike(rng, words) if words.split == "train" and rng.random() < _ALIKE_SHARE else None
    names = words.distinct(alike or (lambda: _key(rng, words)), keys)
    per_key = rng.randint(2, 3) if kind == "multivalue" else 1
    numbers = rng.sample(range(100000, 1000000), keys * per_key)
    pairs = [(name, str(numbers.pop())) for name in names for _ in range(per_key)]
    rng.shuffle(pairs)
    values = {name: [value for other, value in pairs if other == name] for name in names}
    frame = rng.choice(_FRAMES[words.split])
    needles = [frames.tell(rng, words.split, frame.format(key=name, value=value)) for name, value in pairs]
    asked = rng.sample(names, 2) if kind == "multiquery" else [names[0]]
    answers = [value for name in asked for value in values[name]]
    asks = _ASKS_ALL if kind == "multivalue" else _ASKS
    ask = rng.choice(asks[words.split]).format(keys=" and ".join(asked))
    return _Hidden(
        needles=tuple(needles),
        question=frames.ask(rng, words.split, ask),
        answers=tuple(answers),
        reply=_reply({name: values[name] for name in asked}),
        rivals=tuple(value for held in values.values() for value in held if value not in answers),
        pairs=tuple(pairs),
    )


def _key(rng: random.Random, words: Words) -> str:
    if rng.random() < words.made_up:
        return words.pseudo(rng)
    noun = rng.choice(listed("word", words.split))
    return f"{rng.choice(listed('adjective', words.split))}-{noun}" if rng.random() < _ADJECTIVE_SHARE else noun


def _alike(rng: random.Random, words: Words) -> Callable[[], str]:
    """Keys of few words, so that many share one: both words of a key must be minded, which chance seldom teaches."""
    nouns, adjectives = (rng.sample(listed(kind, words.split), 4) for kind in ("word", "adjective"))
    nouns += rng.sample(words.borrowed, 2) if len(words.borrowed) > 1 else []

    def key() -> str:
        noun = rng.choice(nouns)
        return noun if rng.random() < 0.25 else f"{rng.choice(adjectives)}-{noun}"

    return key


def _chain(rng: random.Random, split: str) -> _Hidden:
    """Two chains of three variables; the reply names those of one chain."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 6:
        name = "".join(rng.choices(letters, k=3))
        if name not in names:
            names.append(name)
    values = [str(value) for value in rng.sample(range(10000, 100000), 2)]
    queues = []
    for value, chain in zip(values, (names[:3], names[3:]), strict=True):
        first = f"VAR {chain[0]} = {value}."
        later = [f"VAR {name} = VAR {before}." for before, name in pairwise(chain)]
        queues.append(iter([first, *later]))
    # The sentences of both chains in a random order, each chain in its order.
    order = sorted((rng.random(), which) for which in (0, 0, 0, 1, 1, 1))
    return _Hidden(
        needles=tuple(next(queues[which]) for _, which in order),
        question=rng.choice(_CHAIN_ASKS[split]).format(value=values[0]),
        answers=tuple(names[:3]),
        reply=f"{values[0]}: VAR {names[0]}, VAR {names[1]}, VAR {names[2]}.",
        rivals=tuple(names[3:]),
    )
