"""What a model replies to dialogues under a plan: turn by turn on one folded cache, every finished turn folded.

Where the history is golden, the model's reply to a turn is asked and then forgotten, and the golden one is fed in its
place; where it is the model's own, what it said goes back as text, as a chat client would send it. Dialogues of the
same shape and like length go together. It knows nothing of judges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.bench.ask.asking import group_by_length, has_sliding_layers, stop_tokens
from kvfold.bench.ask.cost import pace_fields, size_fields
from kvfold.bench.ask.reader import open_rows
from kvfold.bench.ask.script import script
from kvfold.bench.judging.talk import Talk
from kvfold.bench.subject import Subject
from kvfold.data import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """What was said in the turns of one dialogue that count."""

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    cost: Mapping[str, Any]  # the fields of an Outcome that say what the last of them cost

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "tokens": [list(each) for each in self.tokens],
            "texts": list(self.texts),
            "cost": dict(self.cost),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Replies":
        """What `as_json` made."""
        tokens = tuple(tuple(each) for each in entry["tokens"])
        return cls(tokens=tokens, texts=tuple(entry["texts"]), cost=entry["cost"])


def replies(subject: Subject, plan: str, talks: Sequence[Talk], *, reply_tokens: int) -> list[Replies]:
    """Every dialogue's replies, in order. Raises ModelError for a tokenizer that was not made for chat."""
    found: dict[int, Replies] = {}
    for group in _groups(subject, talks):
        conversation = _Conversation(subject, plan, [talks[i] for i in group], reply_tokens)
        found |= zip(group, conversation.run(), strict=True)
    return [found[i] for i in range(len(talks))]


def _groups(subject: Subject, talks: Sequence[Talk]) -> list[list[int]]:
    """Which dialogues go together: those with the same turns to ask, and of like length."""
    shapes: dict[tuple[bool, ...], list[int]] = {}
    for i, talk in enumerate(talks):
        shapes.setdefault(tuple(turn.counts for turn in talk.turns), []).append(i)
    alone = has_sliding_layers(subject)
    together = []
    for indices in shapes.values():
        lengths = [sum(len(turn.question) + len(turn.reply or "") for turn in talks[i].turns) for i in indices]
        together += [[indices[row] for row in group] for group in group_by_length(lengths, alone=alone)]
    return together


class _Conversation:
    """Some dialogues side by side. It changes with every turn."""

    def __init__(self, subject: Subject, plan: str, talks: Sequence[Talk], reply_tokens: int) -> None:
        self.subject, self.talks, self.limit = subject, talks, reply_tokens
        self.rows = open_rows(subject, plan, count=len(talks))
        self.said: list[list[Message]] = [[] for _ in talks]
        self.tokens: list[list[tuple[int, ...]]] = [[] for _ in talks]
        self.texts: list[list[str]] = [[] for _ in talks]
        self.cost: Mapping[str, Any] = {}

    def run(self) -> list[Replies]:
        """All turns; afterwards every reply that counts is there."""
        last = len(self.talks[0].turns) - 1
        for turn in range(last + 1):
            self._say("user", [talk.turns[turn].question for talk in self.talks])
            answers = self._answers(turn)
            if turn < last:
                golden = [talk.turns[turn].reply for talk in self.talks]
                self._say(
                    "assistant", [own if given is None else given for own, given in zip(answers, golden, strict=True)]
                )
                self._remember([talk.turns[turn + 1].question for talk in self.talks])
        return [
            Replies(tokens=tuple(tokens), texts=tuple(texts), cost=self.cost)
            for tokens, texts in zip(self.tokens, self.texts, strict=True)
        ]

    def _say(self, role: str, contents: Sequence[str]) -> None:
        for said, content in zip(self.said, contents, strict=True):
            said.append(Message(role=role, content=content))

    def _answers(self, turn: int) -> list[str]:
        """The model's replies to the newest question, where anybody needs them."""
        if not any(talk.turns[turn].counts or talk.turns[turn].reply is None for talk in self.talks):
            return [""] * len(self.talks)
        tokenizer = self.subject.tokenizer
        spent = self.rows.ledger()
        answers = self.rows.answer(
            [script(tokenizer, said).question for said in self.said],
            max_new_tokens=self.limit,
            stop=stop_tokens(self.subject),
        )
        texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
        for row, talk in enumerate(self.talks):
            if talk.turns[turn].counts:
                self.tokens[row].append(tuple(answers[row]))
                self.texts[row].append(texts[row])
        self.cost = size_fields(spent, rows=len(self.talks)) | pace_fields(self.rows.pace)
        return texts

    def _remember(self, next_questions: Sequence[str]) -> None:
        """Feed the finished turn, as it stands in the text that goes on with the next question, and fold."""
        turns = [
            script(self.subject.tokenizer, [*said, Message(role="user", content=question)]).turns[-1]
            for said, question in zip(self.said, next_questions, strict=True)
        ]
        self.rows.feed(turns)
        self.rows.fold()
