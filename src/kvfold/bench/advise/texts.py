"""Texts: the passages on which plans are compared, cut from the user's file or from generated dialogues.

Passages begin evenly spread over the text and do not overlap. A short text gives shorter passages. It knows tokens and
characters, and no plan.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.bench.suites.fidelity import CHARACTERS
from kvfold.chat.tokens import TextTokens
from kvfold.data.passages import Passage, passages
from kvfold.errors import DataError

FOLDED = 768  # tokens that are folded before anything is compared
COMPARED = 64  # tokens behind them, of each passage
PASSAGES = 4
FEWEST_FOLDED = 64
SEAMS = 8  # tokens to spare: a text that is cut may begin with other tokens
MOST_CHARACTERS = 2_000_000  # of a file that are read: far more than the passages need


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Passages, and how many tokens of each are folded before the others are compared."""

    passages: tuple[Passage, ...]
    folded: int
    source: str  # as words


def texts_for(tokenizer: Any, file: Path | None, *, positions: int | None) -> Texts:
    """Cut the passages for a model that reads so many tokens at most.

    Raises DataError for a file that cannot be read or is too short, and for a model that reads too little.
    """
    room = FOLDED if positions is None else min(FOLDED, positions - COMPARED - SEAMS)
    text = _generated() if file is None else _read(file)
    tokens = TextTokens.of(tokenizer, text)
    share = len(tokens.ids) // PASSAGES
    folded = min(room, share - COMPARED - SEAMS)
    if folded < FEWEST_FOLDED:
        needed = PASSAGES * (FEWEST_FOLDED + COMPARED + SEAMS)
        raise DataError(
            f"plans were to be compared on {_name(file)}; it has {len(tokens.ids)} tokens, and the model reads "
            f"{positions or 'any number'}; give a text and a model of {needed} tokens or more"
        )
    length = folded + COMPARED + SEAMS
    pieces = []
    for first in range(0, PASSAGES * share, share):
        start, end = tokens.starts[first], tokens.ends[first + length - 1]
        pieces.append(Passage(family="text", text=text[start:end]))
    return Texts(passages=tuple(pieces), folded=folded, source=_name(file))


def _generated() -> str:
    """Write dialogues that no adapter was trained on, one after the other."""
    characters = CHARACTERS * PASSAGES * (FOLDED + COMPARED)
    [made] = passages(None, n=1, seed=0, characters=characters, whole=False)
    return "\n".join(f"{message.role}: {message.content}" for message in made.messages)


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} was given as a text; it cannot be read ({error}); give a file of plain text") from None


def _name(file: Path | None) -> str:
    return "generated dialogues" if file is None else str(file)
