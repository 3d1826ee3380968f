"""needle: which of several sentences hidden in a long document can still be found after the document was folded?

Generated documents of five kinds, held-out keys, wordings and numbers; the question is not known when the document is
folded (unseen), or is folded with it (seen). A reply counts when it holds every number that was asked for and no other.
Filler is generated chit-chat, or with `--data` sentences of real text. Version 1 is frozen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import comb
from pathlib import Path
from typing import Any, Literal

from kvfold.bench.ask.asking import Answer, ask_each
from kvfold.bench.ask.prompts import length, prompt, reply
from kvfold.bench.choices import as_json
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.data import NEEDLES, Document, needle
from kvfold.data.excerpts import source
from kvfold.data.files import read_rows
from kvfold.errors import SuiteError

REPLY_TOKENS = 96  # more than the longest canonical reply
SPLIT = "heldout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """A document that is written when it is asked about: its length is counted by the model's own tokenizer."""

    kind: str
    tokens: int
    seed: int
    data: Path | None

    def document(self, tokenizer: Any) -> Document:
        """The document as this tokenizer measures it."""
        return self._written(partial(length, tokenizer))

    def shortcut(self) -> float:
        """The chance of the right reply for one who finds all needles, and takes any that fit the question."""
        made = self._written(lambda text: len(text.split()))  # the same needles: they are drawn before the filler
        answers, rivals = len(made.answers), len(made.rivals)
        if self.kind in ("multivalue", "variable"):
            return 0.5  # two keys, two chains: all needles of one of them
        return 1 / comb(answers + rivals, answers)

    def _written(self, count: Any) -> Document:
        filler = () if self.data is None else _sentences(self.data)
        return needle(self.kind, split=SPLIT, tokens=self.tokens, count=count, seed=self.seed, filler=filler)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleSuite(SharingSuite):
    """Questions about sentences in a long document. Nothing in it changes."""

    tokens: int = 2048
    question: Literal["seen", "unseen"] = "unseen"
    kinds: tuple[str, ...] = NEEDLES
    data: Path | None = None

    name = "needle"
    version = 1
    rows = 8
    opens_with = 1
    data_file = "novels.jsonl.xz"

    def __post_init__(self) -> None:
        odd = [kind for kind in self.kinds if kind not in NEEDLES]
        if odd or not self.kinds:
            raise SuiteError(f"kinds {', '.join(odd) or 'none'} were set; there are {', '.join(NEEDLES)}; set some")

    @property
    def query_aware(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the question is folded with the document."""
        return self.question == "seen"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was chosen, and the split."""
        return as_json(self) | {"split": SPLIT}

    def samples(self, *, n: int, seed: int) -> Sequence[Hidden]:
        """The kinds in turn."""
        return [
            Hidden(kind=self.kinds[i % len(self.kinds)], tokens=self.tokens, seed=seed * 1_000_003 + i, data=self.data)
            for i in range(n)
        ]

    def shortcut(self, samples: Sequence[Hidden]) -> Mapping[str, float]:
        """What finding every needle and guessing among them scores; 1 where there is only one to find."""
        chances: dict[str, list[float]] = {}
        for sample in samples:
            chances.setdefault(sample.kind, []).append(sample.shortcut())
        return {kind: sum(each) / len(each) for kind, each in chances.items()}

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[Hidden]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Write and feed, then fold and ask under every plan."""
        documents = [sample.document(subject.tokenizer) for sample in samples]
        prompts = [
            prompt(
                subject.tokenizer,
                document.prompt,
                question=document.question,
                seen=self.query_aware,
                reply_tokens=REPLY_TOKENS,
            )
            for document in documents
        ]
        for plan, answers in ask_each(subject, plans, prompts):
            yield plan, {i: _outcome(subject, documents[i], answer) for i, answer in answers.items()}


def _outcome(subject: Subject, document: Document, answer: Answer) -> Outcome:
    return Outcome(
        family=document.kind,
        score=float(document.correct(reply(subject.tokenizer, answer.tokens))),
        metrics=answer.metrics,
        **answer.fields,
    )


@cache
def _sentences(path: Path) -> tuple[str, ...]:
    return source(read_rows(path)).sentences


SUITE = NeedleSuite()
