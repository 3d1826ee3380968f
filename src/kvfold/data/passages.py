"""Passages: stretches of text and whole dialogues that a model reads on from, out of a file or made up.

Each follows from the seed and its number alone, so that more of them begin with the same ones. Text is cut in
characters, since tokens are unknown here: generously, the reader cuts again. Dialogues stay whole; where a passage
must have a length, several are put one after the other.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from kvfold.data.dialogue import Message
from kvfold.data.families import FAMILIES, dialogue
from kvfold.data.files import prose, read_rows
from kvfold.errors import DataError

ROLES = ("system", "user", "assistant")
FEWEST_TURNS, LENGTHS = 16, 9  # made-up dialogues have 16 to 24 turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Either a text or a dialogue that ends with a reply."""

    family: str
    text: str = ""
    messages: tuple[Message, ...] = ()


def passages(path: Path | None, *, n: int, seed: int, characters: int, whole: bool) -> list[Passage]:
    """`n` passages from a file, or made up where there is none.

    Texts are `characters` long. Dialogues are single ones (`whole`), or as many in a row as have so many characters.
    Raises DataError for a file of another shape, or with too little in it.
    """
    joined = 0 if whole else characters
    if path is None:
        return [_made_up(number, seed=seed, characters=joined) for number in range(n)]
    rows = read_rows(path)
    family = path.name.split(".jsonl")[0].removesuffix(".txt")
    if all(is_dialogue(row) for row in rows):
        return _dialogues(path, rows, family, n=n, seed=seed, characters=joined)
    return _texts(path, rows, family, n=n, seed=seed, characters=characters)


def is_dialogue(row: dict) -> bool:
    """Whether a row holds messages of roles, rather than text or the talk of several speakers."""
    return "messages" in row and all(message.get("role") in ROLES for message in row["messages"])


def spoken(row: dict) -> tuple[Message, ...]:
    """The messages of a row, as far as its last reply."""
    said = [Message(role=message["role"], content=message["content"]) for message in row["messages"]]
    while said and said[-1].role != "assistant":
        said.pop()
    return tuple(said)


def _made_up(number: int, *, seed: int, characters: int) -> Passage:
    family = FAMILIES[number % len(FAMILIES)]
    # Dialogues that lengthen a passage have seeds that no passage starts with.
    seeds = count(seed * 1_000_003 + number, 100_000_000_019)
    dialogues = (_invented(family, start) for start in seeds)
    return Passage(family=family, messages=_together(dialogues, characters))


def _invented(family: str, start: int) -> tuple[Message, ...]:
    made = dialogue(family, split="heldout", turns=FEWEST_TURNS + start % LENGTHS, seed=start)
    return (*made.messages, Message(role="assistant", content=made.reply))


def _dialogues(path: Path, rows: Sequence[dict], family: str, *, n: int, seed: int, characters: int) -> list[Passage]:
    every = [spoken(row) for row in rows]
    found = [messages for messages in every if len(messages) >= 4]
    if n > len(found):
        raise DataError(
            f"{n} dialogues were asked of {path}; {len(found)} of its rows have two turns or more; "
            "ask for fewer with --n"
        )
    random.Random(f"passages:{seed}").shuffle(found)
    if sum(_characters(messages) for messages in found) < characters:
        raise DataError(
            f"dialogues of {characters} characters were asked of {path}; all of it is shorter; set a shorter context"
        )
    made = []
    for first in range(n):
        in_turn = chain(found[first:], found[:first])
        made.append(Passage(family=family, messages=_together(in_turn, characters)))
    return made


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)


def _together(dialogues: Iterator[tuple[Message, ...]], characters: int) -> tuple[Message, ...]:
    """Dialogues in a row, the first and as many more as it takes."""
    joined = next(dialogues)
    while _characters(joined) < characters:
        joined += next(dialogues)
    return joined


def _texts(path: Path, rows: Sequence[dict], family: str, *, n: int, seed: int, characters: int) -> list[Passage]:
    odd = next((row for row in rows if "text" not in row and "messages" not in row), None)
    if odd is not None:
        raise DataError(
            f"{path} was given; a row of it holds {', '.join(odd)}; text is read from text or messages; "
            "give such a file"
        )
    texts = [prose(row) for row in rows]
    long = [text for text in texts if len(text) >= characters]
    if not long:
        raise DataError(
            f"text of {characters} characters in one piece was asked of {path}; its longest has "
            f"{max(map(len, texts))}; set a shorter context or continuation"
        )
    random.Random(f"passages:{seed}").shuffle(long)
    made = []
    for number in range(n):
        text = long[number % len(long)]
        window = _window(text, random.Random(f"{seed}:{number}"), characters)
        made.append(Passage(family=family, text=window))
    return made


def _window(text: str, rng: random.Random, characters: int) -> str:
    """A stretch of a text that begins with a word."""
    start = rng.randrange(len(text) - characters + 1)
    start = text.rfind(" ", 0, start) + 1
    return text[start : start + characters]
