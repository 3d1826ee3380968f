"""A model's replies to dialogues under a plan: turn by turn on one folded cache, every finished turn folded.

Where the history is golden, the model replies, the reply is forgotten, and the golden one is fed in its place; where
the history is the model's, its reply goes back as text, as a chat client would send it. Dialogues of the
same shape and like length go together. It knows nothing of judges.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.bench.ask.asking import group_by_length, has_sliding_layers, stop_tokens
from kvfold.bench.ask.cost import pace_fields, size_fields
from kvfold.bench.ask.reader import Reader, open_rows
from kvfold.bench.ask.script import script
from kvfold.bench.ask.shared import SharedRows
from kvfold.bench.judging.dialogues import JudgedDialogue, JudgedTurn
from kvfold.bench.subject import Subject
from kvfold.data import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """The replies to the judged turns of one dialogue."""

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    cost: Mapping[str, Any]  # the fields of an Outcome that say what the last of them cost

    def as_json(self) -> dict[str, Any]:
        """Give them in JSON's types."""
        return {
            "tokens": [list(each) for each in self.tokens],
            "texts": list(self.texts),
            "cost": dict(self.cost),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Replies":
        """Read what `as_json` made."""
        tokens = tuple(tuple(each) for each in entry["tokens"])
        return cls(tokens=tokens, texts=tuple(entry["texts"]), cost=entry["cost"])


def replies_each(
    subject: Subject, plans: Sequence[str], dialogues: Sequence[JudgedDialogue], *, reply_tokens: int
) -> Iterator[tuple[str, dict[int, Replies]]]:
    """Make every dialogue's replies under every plan; yield them by number. What nothing is folded for is made once.

    Raises SuiteError for a tokenizer that was not made for chat.
    """
    for group in _groups(subject, dialogues):
        chosen = [dialogues[i] for i in group]
        read = SharedRows(subject, plans, count=len(group))
        first = None
        if any(read.shares(plan) for plan in plans):
            first = _Conversations(subject, read.reading, chosen, reply_tokens)
            first.turn(0, read)
        for plan in plans:
            if first is not None and read.shares(plan):
                talk = first.under(read.under(plan))
            else:
                talk = _Conversations(subject, open_rows(subject, plan, count=len(group)), chosen, reply_tokens)
                talk.turn(0, talk.rows)
            yield plan, dict(zip(group, talk.finish(), strict=True))


def _groups(subject: Subject, dialogues: Sequence[JudgedDialogue]) -> list[list[int]]:
    """The numbers of dialogues that go together: the same turns are judged, and they are of like length."""
    shapes: dict[tuple[bool, ...], list[int]] = {}
    for i, dialogue in enumerate(dialogues):
        shape = tuple(turn.counts for turn in dialogue.turns)
        shapes.setdefault(shape, []).append(i)
    alone = has_sliding_layers(subject)
    together = []
    for indices in shapes.values():
        lengths = [_characters(dialogues[i]) for i in indices]
        for group in group_by_length(lengths, alone=alone):
            together.append([indices[row] for row in group])
    return together


def _characters(dialogue: JudgedDialogue) -> int:
    return sum(len(turn.question) + len(turn.reply or "") for turn in dialogue.turns)


class _Conversations:
    """Dialogues side by side. It changes with every turn."""

    def __init__(self, subject: Subject, rows: Reader, dialogues: Sequence[JudgedDialogue], reply_tokens: int) -> None:
        self.subject = subject
        self.dialogues = dialogues
        self.limit = reply_tokens
        self.rows = rows
        self.messages: list[list[Message]] = [[] for _ in dialogues]
        self.tokens: list[list[tuple[int, ...]]] = [[] for _ in dialogues]  # of the judged replies
        self.texts: list[list[str]] = [[] for _ in dialogues]
        self.cost: Mapping[str, Any] = {}  # of the newest reply
        self.shared = False  # whether several plans go on from the first turn

    def under(self, rows: Reader) -> "_Conversations":
        """The same conversations so far, to go on in these rows."""
        twin = _Conversations(self.subject, rows, self.dialogues, self.limit)
        twin.messages = [list(messages) for messages in self.messages]
        twin.tokens = [list(tokens) for tokens in self.tokens]
        twin.texts = [list(texts) for texts in self.texts]
        twin.cost, twin.shared = self.cost, True
        return twin

    def turn(self, number: int, memory: Reader | SharedRows) -> None:
        """Carry out one turn; `memory` reads it where others follow."""
        turns = [dialogue.turns[number] for dialogue in self.dialogues]
        self._append("user", [turn.question for turn in turns])
        answers = self._answers(turns)
        if number == self._last:
            return
        # A golden reply stands in the history in place of the model's.
        history = [answer if turn.reply is None else turn.reply for turn, answer in zip(turns, answers, strict=True)]
        self._append("assistant", history)
        memory.feed(self._finished([dialogue.turns[number + 1].question for dialogue in self.dialogues]))

    def finish(self) -> list[Replies]:
        """Carry out all turns after the first; every finished one is folded."""
        for number in range(1, self._last + 1):
            self.rows.fold()
            self.turn(number, self.rows)
        cost = {**self.cost, "shared_prefill": self.shared}
        return [
            Replies(tokens=tuple(tokens), texts=tuple(texts), cost=cost)
            for tokens, texts in zip(self.tokens, self.texts, strict=True)
        ]

    @property
    def _last(self) -> int:
        return len(self.dialogues[0].turns) - 1

    def _append(self, role: str, contents: Sequence[str]) -> None:
        for messages, content in zip(self.messages, contents, strict=True):
            messages.append(Message(role=role, content=content))

    def _answers(self, turns: Sequence[JudgedTurn]) -> list[str]:
        """The model's replies to the newest question, where they are judged or stand in the history."""
        if not any(turn.counts or turn.reply is None for turn in turns):
            return [""] * len(turns)
        tokenizer = self.subject.tokenizer
        sizes = size_fields(self.rows.ledger(), rows=len(turns))
        answers = self.rows.answer(
            [script(tokenizer, messages).question for messages in self.messages],
            max_new_tokens=self.limit,
            stop=stop_tokens(self.subject),
        )
        self.cost = sizes | pace_fields(self.rows.pace)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
        for row, turn in enumerate(turns):
            if turn.counts:
                self.tokens[row].append(tuple(answers[row]))
                self.texts[row].append(texts[row])
        return texts

    def _finished(self, next_questions: Sequence[str]) -> list[tuple[int, ...]]:
        """The finished turn, as it stands in the text that goes on with the next question."""
        chunks = []
        for messages, question in zip(self.messages, next_questions, strict=True):
            continued = [*messages, Message(role="user", content=question)]
            chunks.append(script(self.subject.tokenizer, continued).turns[-1])
        return chunks
