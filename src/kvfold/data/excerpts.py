"""Real text in pieces: sentences to hide needles among, and excerpts that answer a question.

Made from rows that hold a `text` or `messages`, and for questions `qa`. An excerpt is a few paragraphs; a question
belongs to the one excerpt of its document in which its answer stands word for word, and is left out where that is none
or several. It knows no task.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.data.files import prose

EXCERPT_WORDS = 80  # an excerpt takes paragraphs until it has so many
_SENTENCE_WORDS = range(4, 41)


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """A piece of one document, and the questions that it answers: pairs of question and answer."""

    document: int
    text: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What tasks draw from real text."""

    sentences: tuple[str, ...] = ()
    excerpts: tuple[Excerpt, ...] = ()

    @property
    def questions(self) -> list[tuple[Excerpt, str, str]]:
        """Every excerpt with a question that it answers, and the answer."""
        return [(excerpt, *pair) for excerpt in self.excerpts for pair in excerpt.questions]


def source(rows: Sequence[dict]) -> Source:
    """The sentences and excerpts of these rows."""
    found: list[str] = []
    excerpts: list[Excerpt] = []
    for number, row in enumerate(rows):
        found += sentences(prose(row))
        excerpts += _excerpts(number, row)
    return Source(sentences=tuple(found), excerpts=tuple(excerpts))


def sentences(text: str) -> list[str]:
    """Sentences of ordinary length, white space made plain; headings, lists and fragments are left out."""
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'“])", _plain(text))
    return [sentence for sentence in found if len(sentence.split()) in _SENTENCE_WORDS and sentence[-1] in ".!?"]


def _plain(text: str) -> str:
    """A text with single spaces."""
    return " ".join(text.split())


def _excerpts(number: int, row: dict) -> list[Excerpt]:
    texts = _pieces(prose(row))
    questions: list[list[tuple[str, str]]] = [[] for _ in texts]
    for pair in row.get("qa", ()):
        answer = _plain(pair["answer"]).rstrip(".")
        places = [place for place, text in enumerate(texts) if answer and answer.casefold() in text.casefold()]
        if len(places) == 1:
            questions[places[0]].append((_plain(pair["question"]), answer))
    return [
        Excerpt(document=number, text=text, questions=tuple(answered))
        for text, answered in zip(texts, questions, strict=True)
    ]


def _pieces(text: str) -> list[str]:
    """Paragraphs in a row, as many as it takes for an excerpt."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.strip():
            continue
        if pieces and len(pieces[-1].split()) < EXCERPT_WORDS:
            pieces[-1] += f" {_plain(paragraph)}"
        else:
            pieces.append(_plain(paragraph))
    return pieces
