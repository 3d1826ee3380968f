"""Conversations to learn folding from: generated dialogues, drills and documents, real dialogues, prose in segments.

Each becomes tokens by the model's chat template, with the replies' share in the loss and the ends of its turns.
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
from kvfold.data.needles import next_question
from kvfold.data.real import borrow, rows
from kvfold.data.words import NOTHING, Borrowed
from kvfold.errors import DataError
from kvfold.train.sonic.document_talks import document_talk
from kvfold.train.sonic.study import Study
from kvfold.train.sonic.talk_batch import REPEATED, Talk

REAL_WEIGHT = 0.5  # of a token of a real reply or of prose, against 1 of a reply that a program can check
_NEEDLES = ("single", "multikey", "multikey", "multivalue", "multiquery")
_NEEDED = 240  # tokens, as they are counted here, that any needles fit into
_SHORTEST = 400  # tokens of a document, at most, in the shortest conversations
_TURN_TOKENS = 45  # of a turn of prose, about
_JOINED_SHARE = 0.12  # of the turns, which end no segment
_BORROWED_FROM = 3000  # dialogues, whose words may be borrowed
_UNBORROWED_SHARE = 0.25  # of the talks, which borrow nothing from real text
_FILLERS = (0.0, 0.3, 0.5, 0.75)  # shares of turns without facts
_QUESTIONS = (0.3, 0.5, 0.8)  # shares of turns that ask
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
    repeats: float = 0.0  # real dialogues and prose that are read once more behind themselves, as KVzip reads them
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
        said = [message.content for dialogue in self.dialogues[:_BORROWED_FROM] for message in dialogue]
        self.borrowed = borrow(self.prose + said)
        self.families = [family for family in FAMILIES if family != mix.without]
        known = {name for family in self.families for name in _OF_FAMILY[family]} - {"sums"}
        self.drills = [name for name in DRILLS if name in known]

    def draw(self, rng: random.Random, *, turns: int, count: int, most: int) -> tuple[str, list[Talk]]:
        """Draw `count` conversations of one source, of about `turns` turns and at most `most` tokens."""
        shares = {
            "chat": self.mix.chats,
            "drill": self.mix.drills,
            "document": self.mix.documents,
            "dialogue": self.mix.dialogues if self.dialogues else 0.0,
            "prose": self.mix.prose if self.prose else 0.0,
            "study": self.mix.study,
            REPEATED: self.mix.repeats,
        }
        source = rng.choices(list(shares), list(shares.values()))[0]
        if source == REPEATED:
            count = max(1, count // 2)  # each is twice as long
        talks: list[Talk] = []
        while len(talks) < count:
            talk = self._talk(source, rng, turns, most)
            if talk is not None:
                talks.append(talk)
        return source, talks

    def _talk(self, source: str, rng: random.Random, turns: int, most: int) -> Talk | None:
        """One conversation of a source; None where it came out too long."""
        seed = rng.getrandbits(48)
        borrowed = self._borrowed(rng)
        if source == "chat":
            return self.encode(self._chat(rng, seed, borrowed, turns), rng, most)
        if source == "drill":
            messages = drill(rng.choice(self.drills), keys=rng.choice((3, 4, 6)), seed=seed, borrowed=borrowed)
            return self.encode(messages, rng, most)
        if source == "document":
            return self._document(rng, seed, borrowed, most=min(most, max(60 * turns, _SHORTEST)))
        if source == "dialogue":
            return self.encode(self._dialogue(rng, turns), rng, most)
        if source == "study":
            return self._studied(rng, turns, most)
        if source == REPEATED:
            return self._repeated(rng, turns, most)
        return self._prose(rng, most=min(most, _TURN_TOKENS * turns))

    def _chat(self, rng: random.Random, seed: int, borrowed: Borrowed, turns: int) -> Sequence[Message]:
        """A generated dialogue."""
        filler = rng.choice(_FILLERS)
        questions = rng.choice(_QUESTIONS)
        return training_dialogue(
            rng.choice(self.families),
            turns=turns,
            seed=seed,
            filler=filler,
            questions=questions,
            borrowed=borrowed,
        )

    def _dialogue(self, rng: random.Random, turns: int) -> Sequence[Message]:
        """Real dialogues, one after the other until there are enough turns."""
        messages: list[Message] = []
        while len(messages) < 2 * turns:
            messages += rng.choice(self.dialogues)
        return messages[: 2 * turns]

    def _studied(self, rng: random.Random, turns: int, most: int) -> Talk | None:
        """A passage that the model has been asked about."""
        assert self.study is not None, "checked when the talks were made"
        tokens = min(most // 2, _TURN_TOKENS * turns)
        passage = self._passage(rng, characters=4 * tokens)
        talk = self.study.draw(rng, passage, questions=rng.randint(1, 3), weight=REAL_WEIGHT)
        return talk if len(talk.ids) <= most else None

    def _repeated(self, rng: random.Random, turns: int, most: int) -> Talk | None:
        """A dialogue or prose that is folded to its end, then read once more: what that needs is what to keep.

        Kim et al., KVzip, https://arxiv.org/abs/2505.23416
        """
        known = [name for name, texts in (("dialogue", self.dialogues), ("prose", self.prose)) if texts]
        talk = self._talk(rng.choice(known or ["chat"]), rng, turns, most // 2)
        if talk is None:
            return None
        again = [REAL_WEIGHT] * len(talk.ids)
        return Talk(
            ids=[*talk.ids, *talk.ids],
            weights=[*talk.weights, *again],
            ends=[*talk.ends, len(talk.ids)],
        )

    def _passage(self, rng: random.Random, *, characters: int) -> str:
        """Whole words of a text."""
        text = rng.choice(self.prose)
        start = rng.randrange(max(1, len(text) - characters))
        return " ".join(text[start : start + characters].split()[1:-1])

    def _borrowed(self, rng: random.Random) -> Borrowed:
        """What a talk may borrow from real text; now and then nothing, so that generated words stay practised."""
        return NOTHING if rng.random() < _UNBORROWED_SHARE else self.borrowed

    def encode(self, messages: Sequence[Message], rng: random.Random, most: int) -> Talk | None:
        """Encode a dialogue as a talk whose last turn is open; None where it is too short or too long."""
        texts = []
        shares = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                texts.append(render(self.tokenizer, messages[:index], opens_reply=True))
                texts.append(render(self.tokenizer, messages[: index + 1]))
                shares += [0.0, message.weight]
        pieces = TextTokens.of(self.tokenizer, texts[-1]).cut([len(text) for text in texts])
        ids: list[int] = []
        weights: list[float] = []
        ends = []
        for index, (piece, share) in enumerate(zip(pieces, shares, strict=True)):
            ids += piece
            weights += [share] * len(piece)
            is_reply = index % 2 == 1
            if is_reply and rng.random() > _JOINED_SHARE:
                ends.append(len(ids))
        inner = [end for end in ends if end < len(ids)]  # the last turn stays open: it asks
        return Talk(ids=ids, weights=weights, ends=inner) if inner and len(ids) <= most else None

    def _document(self, rng: random.Random, seed: int, borrowed: Borrowed, *, most: int) -> Talk | None:
        """A document that is folded as a whole, then several questions about it."""
        filler = borrowed.sentences if rng.random() < 0.5 else ()
        kind = rng.choice(_NEEDLES)
        tokens = max(int(most * rng.uniform(0.3, 0.8)), _NEEDED)
        made = needle(
            kind,
            split="train",
            tokens=tokens,
            seed=seed,
            count=_rough_tokens,
            filler=filler,
            borrowed=borrowed.words,
        )
        exchanges = [(made.prompt, made.reply)]
        for _ in range(rng.randint(0, 3)):
            exchanges.append(next_question(made, split="train", rng=rng))
        messages = []
        for question, reply in exchanges:
            messages.append(Message(role="user", content=question))
            messages.append(Message(role="assistant", content=reply))
        document = made.prompt[: -len(made.question)]
        talk = document_talk(self.tokenizer, document, messages, weight=1.0)
        return talk if len(talk.ids) <= most else None

    def _prose(self, rng: random.Random, most: int) -> Talk:
        """A stretch of a real text, cut into segments of about one length."""
        text = rng.choice(self.prose)
        start = rng.randrange(max(1, len(text) - 5 * most))
        ids = self.tokenizer(text[start : start + 5 * most], add_special_tokens=False)["input_ids"][: most - 1]
        opening = self.tokenizer.bos_token_id
        ids = ([] if opening is None else [opening]) + ids
        length = rng.randint(24, 128)
        ends: list[int] = []
        last = 0
        while not ends or last + length < len(ids) - 16:
            last += rng.randint(length // 2, length)
            ends.append(last)
        weights = [0.0] + [REAL_WEIGHT] * (len(ids) - 1)
        return Talk(ids=ids, weights=weights, ends=[end for end in ends if end < len(ids)])


def _rough_tokens(text: str) -> int:
    return len(text) // 4


def _real(folder: Path) -> tuple[list[tuple[Message, ...]], list[str]]:
    """Dialogues and long texts of a folder."""
    dialogues, prose = [], []
    for _, row in rows(folder):
        if "messages" not in row:
            if "text" in row:
                prose.append(row["text"])
        elif all("role" in message for message in row["messages"]):
            turns = tuple(_turns(row["messages"]))
            if len(turns) >= 4:
                dialogues.append(turns)
        else:
            prose.append("\n".join(message["content"].strip() for message in row["messages"]))
    return dialogues, prose


def _turns(messages: Sequence[dict]) -> Iterator[Message]:
    """User and assistant in turn: what one says in a row is one message; the first and the last are dropped to fit."""
    joined = []
    for role, said in groupby(messages, key=lambda message: message["role"]):
        if role in ("user", "assistant"):
            joined.append((role, " ".join(message["content"].strip() for message in said)))
    while joined and joined[0][0] != "user":
        joined.pop(0)
    for role, content in joined[: len(joined) // 2 * 2]:
        yield Message(role=role, content=content, weight=REAL_WEIGHT if role == "assistant" else 0.0)
