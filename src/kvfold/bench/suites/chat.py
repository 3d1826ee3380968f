"""chat: what does a model still know at the end of a long conversation whose history was folded turn by turn?

Generated dialogues of 16 to 24 turns in four families, held-out names, values and wordings. Replies in the history
are scripted; each finished turn is fed and folded; only the last answer is generated, greedily, and judged by
program. Every question is a collision: only the binding of key to value answers it. Version 1 is frozen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.bench.ask.asking import ask_rows, has_sliding_layers
from kvfold.bench.ask.prompts import Prompt
from kvfold.bench.ask.reader import open_rows
from kvfold.bench.ask.script import Script, script
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, Suite
from kvfold.data import CHAT_VERSION, FAMILIES, Dialogue, best_shortcut, dialogue

FEWEST_TURNS, MOST_TURNS = 16, 24
ANSWER_TOKENS = 96  # more than the longest canonical reply
SPLIT = "heldout"


class ChatSuite(Suite):
    """Questions about things told many turns ago. Nothing in it changes."""

    name = "chat"
    version = CHAT_VERSION
    rows = 16
    scopes = ("history", "turn")

    @property
    def settings(self) -> Mapping[str, Any]:
        """The families, the split and the lengths."""
        return {"families": list(FAMILIES), "split": SPLIT, "turns": [FEWEST_TURNS, MOST_TURNS]}

    def samples(self, *, n: int, seed: int) -> Sequence[Dialogue]:
        """The families in turn; lengths and dialogues follow from the seed and the sample's number."""
        lengths = MOST_TURNS - FEWEST_TURNS + 1
        return [
            dialogue(
                FAMILIES[i % len(FAMILIES)], split=SPLIT, turns=FEWEST_TURNS + i % lengths, seed=seed * 1_000_003 + i
            )
            for i in range(n)
        ]

    def shortcut(self, samples: Sequence[Dialogue]) -> Mapping[str, float]:
        """What guessing among the holders of the asked kind, or saying its newest value, or one constant, scores."""
        families = dict.fromkeys(sample.family for sample in samples)
        return {family: best_shortcut([one for one in samples if one.family == family]) for family in families}

    def ask(self, subject: Subject, plan: str, samples: Sequence[Dialogue]) -> list[Outcome]:
        """Feed, fold, ask."""
        scripts = [script(subject.tokenizer, sample.messages) for sample in samples]
        groups = [list(range(len(samples)))]
        if has_sliding_layers(subject):
            groups = [[row] for row in groups[0]]  # pads would shorten the windows of sliding layers
        return [
            outcome
            for group in groups
            for outcome in _ask_together(subject, plan, [samples[i] for i in group], [scripts[i] for i in group])
        ]


def _ask_together(subject: Subject, plan: str, samples: Sequence[Dialogue], scripts: Sequence[Script]) -> list[Outcome]:
    """Read the dialogues turn by turn, fold after each turn, and ask the last question of every one."""
    rows = open_rows(subject, plan, count=len(samples))
    for turn in range(max(len(one.turns) for one in scripts)):
        rows.feed([one.turns[turn] if turn < len(one.turns) else () for one in scripts])
        rows.fold()
    questions = [Prompt(context=(), question=one.question, reply_tokens=ANSWER_TOKENS) for one in scripts]
    answers = ask_rows(subject, rows, questions, stop={subject.tokenizer.eos_token_id})
    replies = [subject.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in answers]
    return [
        Outcome(family=sample.family, score=float(sample.correct(reply)), **answer.cost)
        for sample, reply, answer in zip(samples, replies, answers, strict=True)
    ]


SUITE = ChatSuite()
