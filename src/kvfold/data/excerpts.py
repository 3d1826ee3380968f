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
    excerpts = [excerpt for number, row in enumerate(rows) for excerpt in _excerpts(number, row)]
    return Source(sentences=tuple(s for row in rows for s in sentences(prose(row))), excerpts=tuple(excerpts))


def sentences(text: str) -> list[str]:
    """Sentences of ordinary length, white space made plain; headings, lists and fragments are left out."""
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'“])", " ".join(text.split()))
    return [one for one in found if len(one.split()) in _SENTENCE_WORDS and one[-1] in ".!?"]


def _excerpts(number: int, row: dict) -> list[Excerpt]:
    texts: list[str] = []
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", prose(row)) if part.strip()]
    for paragraph in paragraphs:
        if texts and len(texts[-1].split()) < EXCERPT_WORDS:
            texts[-1] += f" {paragraph}"
        else:
            texts.append(paragraph)
    answered: dict[int, list[tuple[str, str]]] = {}
    for pair in row.get("qa", ()):
        answer = " ".join(pair["answer"].split()).rstrip(".")
        places = [place for place, text in enumerate(texts) if answer and answer.casefold() in text.casefold()]
        if len(places) == 1:
            answered.setdefault(places[0], []).append((" ".join(pair["question"].split()), answer))
    return [
        Excerpt(document=number, text=text, questions=tuple(answered.get(place, ())))
        for place, text in enumerate(texts)
    ]
