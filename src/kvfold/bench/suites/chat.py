"""chat: what does a model still know at the end of a long conversation whose history was folded turn by turn?

Generated dialogues of 16 to 24 turns in four families, held-out names, values and wordings. Replies in the history
are scripted; each finished turn is fed and folded; only the last answer is generated, greedily, and judged by
program. Every question is a collision: only the binding of key to value answers it. Version 1 is frozen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvfold.bench.ask.asking import Answer, ask_rows, has_sliding_layers
from kvfold.bench.ask.prompts import Prompt
from kvfold.bench.ask.reader import Reader
from kvfold.bench.ask.script import Script, script
from kvfold.bench.ask.shared import SharedRows
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.data import CHAT_VERSION, FAMILIES, Dialogue, best_shortcut, dialogue

FEWEST_TURNS, MOST_TURNS = 16, 24
ANSWER_TOKENS = 96  # more than the longest canonical reply
SPLIT = "heldout"


class ChatSuite(SharingSuite):
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

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[Dialogue]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Feed, fold, ask; the first turn is read once."""
        scripts = [script(subject.tokenizer, sample.messages) for sample in samples]
        groups = [list(range(len(samples)))]
        if has_sliding_layers(subject):
            groups = [[row] for row in groups[0]]  # pads would shorten the windows of sliding layers
        for group in groups:
            chosen = [scripts[i] for i in group]
            read = SharedRows(subject, plans, count=len(group))
            read.feed(_turns(chosen, 0))
            for plan in plans:
                answers = _answers(subject, read.under(plan), chosen)
                shared = read.shares(plan)
                found = zip(group, answers, strict=True)
                yield plan, {i: _outcome(subject, samples[i], replace(one, shared=shared)) for i, one in found}


def _answers(subject: Subject, rows: Reader, scripts: Sequence[Script]) -> list[Answer]:
    """Fold the first turn, read the dialogues turn by turn, fold after each, and ask the last question of every one."""
    rows.fold()
    for turn in range(1, max(len(one.turns) for one in scripts)):
        rows.feed(_turns(scripts, turn))
        rows.fold()
    questions = [Prompt(context=(), question=one.question, reply_tokens=ANSWER_TOKENS) for one in scripts]
    return ask_rows(subject, rows, questions)


def _turns(scripts: Sequence[Script], turn: int) -> list[tuple[int, ...]]:
    """One turn of every dialogue; nothing of those that have ended."""
    return [one.turns[turn] if turn < len(one.turns) else () for one in scripts]


def _outcome(subject: Subject, sample: Dialogue, answer: Answer) -> Outcome:
    reply = subject.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    return Outcome(family=sample.family, score=float(sample.correct(reply)), **answer.fields)


SUITE = ChatSuite()
