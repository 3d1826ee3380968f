"""Conversations to learn folding from: generated dialogues, drills and documents, real dialogues, prose in segments.

Each becomes tokens by the model's own chat template, with the replies' share in the loss and the ends of its turns.
One family of generated dialogues may be left out, to see what is learnt without it. Knows nothing of losses.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from kvfold.chat.template import render
from kvfold.chat.tokens import TextTokens
from kvfold.data import FAMILIES, Message, needle, training_dialogue
from kvfold.data.drills import DRILLS, drill
from kvfold.data.needles import asked_next
from kvfold.data.real import borrow, rows
from kvfold.data.words import NOTHING, Borrowed
from kvfold.errors import DataError
from kvfold.train.sonic.document_talks import asked_about
from kvfold.train.sonic.parallel_masks import Talk
from kvfold.train.sonic.study import Study

REAL_WEIGHT = 0.5  # of a token of a real reply or of prose, beside 1 of a reply that a program can check
_NEEDLES = ("single", "multikey", "multikey", "multivalue", "multiquery")
_NEEDED = 240  # tokens, as they are counted here, that any needles fit into
_SHORTEST = 400  # tokens of a document, at most, in the shortest conversations
_OF_FAMILY = {
    "recall": ("people", "kinds"),
    "coreference": ("lists", "relatives", "places"),
    "arithmetic": ("prices", "sums"),
    "rules": ("rules",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What conversations are drawn from, in shares of the draws."""

    chats: float = 0.35
    drills: float = 0.05
    documents: float = 0.15  # with needles, asked about after they are folded
    dialogues: float = 0.3  # real ones, where there are some
    prose: float = 0.15
    study: float = 0.0  # prose that the model asks itself about (study.py)
    without: str | None = None  # a family of chats and drills that is left out

    def __post_init__(self) -> None:
        if self.without is not None and self.without not in FAMILIES:
            raise DataError(
                f"family {self.without!r} was to be left out; there are {', '.join(FAMILIES)}; choose one of them"
            )


class Talks:
    """Draws conversations; the random state is the caller's."""

    def __init__(self, tokenizer: Any, mix: Mix, data: Path | None, study: Study | None = None) -> None:
        """`study` answers for the model where the mix asks for it."""
        if mix.study and (data is None or study is None):
            raise DataError("self-study was asked for; it needs text to ask about; give --data with a folder of it")
        self.tokenizer, self.mix, self.study = tokenizer, mix, study
        self.dialogues, self.prose = _real(data) if data else ([], [])
        self.borrowed = borrow(self.prose + [message.content for one in self.dialogues[:3000] for message in one])
        self.families = [family for family in FAMILIES if family != mix.without]
        kept = {name for family in self.families for name in _OF_FAMILY[family]} - {"sums"}
        self.drills = [name for name in DRILLS if name in kept]

    def draw(self, rng: random.Random, *, turns: int, count: int, most: int) -> tuple[str, list[Talk]]:
        """`count` conversations of one source, of about `turns` turns and at most `most` tokens."""
        mix = self.mix
        real, prose = (mix.dialogues if self.dialogues else 0.0), (mix.prose if self.prose else 0.0)
        sources = {"chat": mix.chats, "drill": mix.drills, "document": mix.documents, "dialogue": real, "prose": prose,
                   "study": mix.study}  # fmt: skip
        source = rng.choices(list(sources), list(sources.values()))[0]
        talks: list[Talk] = []
        while len(talks) < count:
            talk = self._one(source, rng, turns, most)
            if talk is not None:
                talks.append(talk)
        return source, talks

    def _one(self, source: str, rng: random.Random, turns: int, most: int) -> Talk | None:
        seed, loan = rng.getrandbits(48), self._loan(rng)
        if source == "chat":
            filler, asks = rng.choice((0.0, 0.3, 0.5, 0.75)), rng.choice((0.3, 0.5, 0.8))
            family = rng.choice(self.families)
            made = training_dialogue(family, turns=turns, seed=seed, filler=filler, questions=asks, borrowed=loan)
            return self.encode(made, rng, most)
        if source == "drill":
            return self.encode(drill(rng.choice(self.drills), keys=rng.choice((3, 4, 6)), seed=seed, borrowed=loan),
                               rng, most)  # fmt: skip
        if source == "document":
            return self._document(rng, seed, loan, most=min(most, max(60 * turns, _SHORTEST)))
        if source == "dialogue":
            messages: list[Message] = []
            while len(messages) < 2 * turns:
                messages += rng.choice(self.dialogues)
            return self.encode(messages[: 2 * turns], rng, most)
        if source == "study":
            assert self.study is not None, "checked when the talks were made"
            passage = self._passage(rng, characters=4 * min(most // 2, 45 * turns))
            talk = self.study.draw(rng, passage, questions=rng.randint(1, 3), weight=REAL_WEIGHT)
            return talk if len(talk.ids) <= most else None
        return self._prose(rng, most=min(most, 45 * turns))

    def _passage(self, rng: random.Random, *, characters: int) -> str:
        """Some whole words of a text."""
        text = rng.choice(self.prose)
        start = rng.randrange(max(1, len(text) - characters))
        return " ".join(text[start : start + characters].split()[1:-1])

    def _loan(self, rng: random.Random) -> Borrowed:
        return NOTHING if rng.random() < 0.25 else self.borrowed

    def encode(self, messages: Sequence[Message], rng: random.Random, most: int) -> Talk | None:
        """A dialogue as a talk whose last turn is open; None where it is too short or too long."""
        texts, shares = [], []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                texts += [render(self.tokenizer, messages[:index], opens_reply=True),
                          render(self.tokenizer, messages[: index + 1])]  # fmt: skip
                shares += [0.0, message.weight]
        pieces = TextTokens.of(self.tokenizer, texts[-1]).cut([len(text) for text in texts])
        ids = [token for piece in pieces for token in piece]
        weights = [share for piece, share in zip(pieces, shares, strict=True) for _ in piece]
        ends, at = [], 0
        for index, piece in enumerate(pieces):
            at += len(piece)
            if index % 2 == 1 and rng.random() > 0.12:  # now and then two turns are one segment
                ends.append(at)
        inner = [end for end in ends if end < at]  # the last turn stays open: it asks
        return Talk(ids=ids, weights=weights, ends=inner) if inner and len(ids) <= most else None

    def _document(self, rng: random.Random, seed: int, loan: Borrowed, *, most: int) -> Talk | None:
        """A document that is folded as a whole, then several questions about it."""
        filler = loan.sentences if rng.random() < 0.5 else ()
        made = needle(
            rng.choice(_NEEDLES), split="train", tokens=max(int(most * rng.uniform(0.3, 0.8)), _NEEDED), seed=seed,
            count=lambda text: len(text) // 4, filler=filler, borrowed=loan.words,
        )  # fmt: skip
        messages = [Message(role="user", content=made.prompt), Message(role="assistant", content=made.reply)]
        for _ in range(rng.randint(0, 3)):
            question, reply = asked_next(made, split="train", rng=rng)
            messages += [Message(role="user", content=question), Message(role="assistant", content=reply)]
        talk = asked_about(self.tokenizer, made.prompt[: -len(made.question)], messages, weight=1.0)
        return talk if len(talk.ids) <= most else None

    def _prose(self, rng: random.Random, most: int) -> Talk:
        text = rng.choice(self.prose)
        start = rng.randrange(max(1, len(text) - 5 * most))
        ids = self.tokenizer(text[start : start + 5 * most], add_special_tokens=False)["input_ids"][: most - 1]
        opening = self.tokenizer.bos_token_id
        ids = ([] if opening is None else [opening]) + ids
        length, ends = rng.randint(24, 128), []
        while not ends or ends[-1] + length < len(ids) - 16:
            ends.append((ends[-1] if ends else 0) + rng.randint(length // 2, length))
        return Talk(
            ids=ids, weights=[0.0] + [REAL_WEIGHT] * (len(ids) - 1), ends=[end for end in ends if end < len(ids)]
        )


def _real(folder: Path) -> tuple[list[tuple[Message, ...]], list[str]]:
    """Dialogues and long texts of a folder."""
    dialogues, prose = [], []
    for _, row in rows(folder):
        if "messages" in row and all("role" in message for message in row["messages"]):
            said = tuple(_turns(row["messages"]))
            if len(said) >= 4:
                dialogues.append(said)
        elif "messages" in row:
            prose.append("\n".join(message["content"].strip() for message in row["messages"]))
        elif "text" in row:
            prose.append(row["text"])
    return dialogues, prose


def _turns(messages: Sequence[dict]) -> Iterator[Message]:
    """User and assistant in turn: what one says in a row is one message; the first and the last are dropped to fit."""
    joined = [
        (role, " ".join(message["content"].strip() for message in said))
        for role, said in groupby(messages, key=lambda message: message["role"])
        if role in ("user", "assistant")
    ]
    while joined and joined[0][0] != "user":
        joined.pop(0)
    for role, content in joined[: len(joined) // 2 * 2]:
        yield Message(role=role, content=content, weight=REAL_WEIGHT if role == "assistant" else 0.0)
