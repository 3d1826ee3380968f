"""mtbench101_replies: how likely are the golden replies of MT-Bench-101 when the turns before them are folded?

The dialogues of `mtbench101`, without a judge and without a reply of the model's own: each turn is read and folded, and
the likelihood of every later golden reply is measured, token by token, with its divergence from the full cache. It
mirrors a set of the SONIC paper (https://arxiv.org/abs/2601.21927), which lets a judge grade replies. Version 1 is
frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvfold.bench.ask.read_turns import ValuesSuite
from kvfold.bench.judging.dialogues import JudgedDialogue
from kvfold.bench.suites.mtbench101 import MTBench101
from kvfold.data import Message
from kvfold.data.values import History, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class MTBench101Replies(ValuesSuite):
    """Golden replies of later turns."""

    score: Literal["exact", "likelihood"] = "likelihood"  # few models say a whole golden reply
    words: int | None = None  # only dialogues of at most so many words
    data: Path | None = None

    name = "mtbench101_replies"
    version = 1
    data_file = "mtbench101.jsonl.xz"

    def samples(self, *, n: int, seed: int) -> Sequence[History]:
        """Draw dialogues, the tasks in turn."""
        dialogues = MTBench101(data=self.data, words=self.words).samples(n=n, seed=seed)
        return [_history(dialogue) for dialogue in dialogues if any(turn.reply for turn in dialogue.turns[1:])]


def _history(dialogue: JudgedDialogue) -> History:
    """Ask for every reply but the first, which no turn precedes."""
    messages, values = [], []
    for number, turn in enumerate(dialogue.turns):
        reply = turn.reply or ""
        messages.append(Message(role="user", content=turn.question))
        messages.append(Message(role="assistant", content=reply))
        if number and reply:
            values.append(Value(message=len(messages) - 1, start=0, end=len(reply), slot=dialogue.task, distance=1))
    return History(family=dialogue.task, messages=tuple(messages), values=tuple(values))


SUITE = MTBench101Replies()
