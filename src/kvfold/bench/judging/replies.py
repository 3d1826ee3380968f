"""A model's replies to dialogues under a plan: turn by turn on one folded cache, every finished turn folded.

Where the history is golden, the model replies, the reply is forgotten, and the golden one is fed in its place; where
the history is the model's, its reply goes back as text, as a chat client would send it. Dialogues of the
same shape and like length go together. It knows nothing of judges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.bench.ask.asking import group_by_length, has_sliding_layers, stop_tokens
from kvfold.bench.ask.cost import pace_fields, size_fields
from kvfold.bench.ask.reader import open_rows
from kvfold.bench.ask.script import script
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


def replies(subject: Subject, plan: str, dialogues: Sequence[JudgedDialogue], *, reply_tokens: int) -> list[Replies]:
    """Make every dialogue's replies, in order. Raises SuiteError for a tokenizer that was not made for chat."""
    found: dict[int, Replies] = {}
    for group in _groups(subject, dialogues):
        conversations = _Conversations(subject, plan, [dialogues[i] for i in group], reply_tokens)
        found |= zip(group, conversations.run(), strict=True)
    return [found[i] for i in range(len(dialogues))]


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

    def __init__(self, subject: Subject, plan: str, dialogues: Sequence[JudgedDialogue], reply_tokens: int) -> None:
        self.subject = subject
        self.dialogues = dialogues
        self.limit = reply_tokens
        self.rows = open_rows(subject, plan, count=len(dialogues))
        self.messages: list[list[Message]] = [[] for _ in dialogues]
        self.tokens: list[list[tuple[int, ...]]] = [[] for _ in dialogues]  # of the judged replies
        self.texts: list[list[str]] = [[] for _ in dialogues]
        self.cost: Mapping[str, Any] = {}  # of the newest reply

    def run(self) -> list[Replies]:
        """Carry out all turns; afterwards every judged reply is there."""
        last = len(self.dialogues[0].turns) - 1
        for number in range(last + 1):
            turns = [dialogue.turns[number] for dialogue in self.dialogues]
            self._append("user", [turn.question for turn in turns])
            answers = self._answers(turns)
            if number < last:
                # A golden reply stands in the history in place of the model's.
                history = [
                    answer if turn.reply is None else turn.reply for turn, answer in zip(turns, answers, strict=True)
                ]
                self._append("assistant", history)
                self._remember([dialogue.turns[number + 1].question for dialogue in self.dialogues])
        return [
            Replies(tokens=tuple(tokens), texts=tuple(texts), cost=self.cost)
            for tokens, texts in zip(self.tokens, self.texts, strict=True)
        ]

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

    def _remember(self, next_questions: Sequence[str]) -> None:
        """Feed the finished turn, as it stands in the text that goes on with the next question, and fold."""
        chunks = []
        for messages, question in zip(self.messages, next_questions, strict=True):
            continued = [*messages, Message(role="user", content=question)]
            chunks.append(script(self.subject.tokenizer, continued).turns[-1])
        self.rows.feed(chunks)
        self.rows.fold()
