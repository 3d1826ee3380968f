"""faults: what goes wrong without an error, when a cache is used as chats and batches use it?

Two families. `second_turn`: `generate` is called twice with one cache and the whole text; right is to read the last
token of the reply and the new ones, nothing else. `padding`: a short row padded to the width of a longer one; right is
to predict what it predicts alone. It scores conduct, not memory, so dropping everything can be right too and there is
no headroom between floor and ceiling. Rivals take part by --peers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvfold.bench.ask.fault_checks import padded, second_turn
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, Suite
from kvfold.data import FAMILIES, dialogue
from kvfold.errors import SuiteError

KINDS = ("second_turn", "padding")
TURNS = 24  # of the dialogue that a text is taken from
ROUNDING = 32  # times the dtype's step, relative to the largest logit: what pads may change by rounding alone


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSample:
    """One sample: which check, and the text that it is made with."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class FaultsSuite(Suite):
    """Second turns and pads."""

    tokens: int = 160  # of the first turn, and of the row that is padded
    new: int = 12  # of the second turn
    pads: int = 160

    name = "faults"
    version = 1
    rows = 8

    def samples(self, *, n: int, seed: int) -> Sequence[FaultSample]:
        """Alternate the two checks, each with the words of a held-out dialogue."""
        return [FaultSample(kind=KINDS[i % 2], text=_text(i, seed)) for i in range(n)]

    def shortcut(self, samples: Sequence[FaultSample]) -> None:
        """Give None: nothing is remembered here."""

    def ask(self, subject: Subject, plan: str, samples: Sequence[FaultSample]) -> list[Outcome]:
        """Make one check for each sample."""
        return [self._check(subject, plan, sample) for sample in samples]

    def _check(self, subject: Subject, plan: str, sample: FaultSample) -> Outcome:
        ids = subject.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
        if len(ids) < self.tokens + self.new:
            raise SuiteError(
                f"{self.tokens + self.new} tokens were asked for; a text has {len(ids)} here; give smaller settings"
            )
        first, second = ids[: self.tokens], ids[self.tokens : self.tokens + self.new]
        if sample.kind == "second_turn":
            check = second_turn(subject, plan, first, second)
            expected = len(second) + 1  # the reply's last token has not been read yet
            metrics = check.found | {"fed_expected": expected}
            right = check.found["fed"] == expected
        else:
            check = padded(subject, plan, first, pads=self.pads)
            metrics = check.found
            step = torch.finfo(getattr(torch, subject.dtype)).eps
            right = check.found["difference"] <= ROUNDING * step
        return Outcome(
            family=sample.kind,
            score=float(right),
            metrics={name: float(value) for name, value in metrics.items()},
            ttft_seconds=0.0,
            tpot_seconds=0.0,
            **check.sizes,
        )


def _text(number: int, seed: int) -> str:
    family = FAMILIES[number // 2 % len(FAMILIES)]
    made = dialogue(family, split="heldout", turns=TURNS, seed=seed * 1_000_003 + number)
    return " ".join(message.content for message in made.messages)


SUITE = FaultsSuite()
