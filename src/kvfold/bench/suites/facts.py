"""facts: generated documents with facts in them, several questions on each, all on one fold; the demo's suite.

A document is read and folded once, then each question is asked of the same fold, which has not seen it. The score is
the share of the answers that the replies hold. `agreement` is the share of replies that are, token for token, those
under the full cache. Version 1 is frozen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from kvfold.bench.ask.asking import Answer, ask_rows, read_once
from kvfold.bench.ask.divergence import FULL
from kvfold.bench.ask.prompts import Prompt, length, prompt, reply
from kvfold.bench.ask.reader import Reader
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.data.facts import Document, document
from kvfold.errors import SuiteError

REPLY_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FactsSuite(SharingSuite):
    """Facts in documents. Nothing in it changes."""

    tokens: int = 1500  # of a document
    questions: int = 3  # asked of one document, which has one fact more

    name = "facts"
    version = 1
    rows = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.questions < 1:
            raise SuiteError(
                f"{self.questions} questions on {self.tokens} tokens were set; there is nothing to ask; set 1 or more"
            )

    def samples(self, *, n: int, seed: int) -> Sequence[int]:
        """Give the seeds of documents, which are written when a tokenizer is known."""
        return [seed * 1_000_003 + number for number in range(n)]

    def shortcut(self, samples: Sequence[int]) -> Mapping[str, float] | None:
        """Give None: a number of seven digits cannot be guessed."""

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[int]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Read each document once, then fold and ask under every plan."""
        for number, seed in enumerate(samples):
            made = self.document(subject.tokenizer, seed)
            prompts = self._prompts(subject.tokenizer, made)
            read = read_once(subject, [FULL, *plans], [prompts[0].context])
            whole = [answer.tokens for answer in _asked(subject, read.under(FULL), prompts)]
            for plan in plans:
                rows = read.under(plan)
                rows.fold()
                answers = _asked(subject, rows, prompts)
                outcome = _outcome(subject, made, answers, whole)
                yield plan, {number: replace(outcome, shared_prefill=read.shares(plan))}

    def document(self, tokenizer: Any, seed: int) -> Document:
        """Write the document of a seed as this tokenizer measures it."""
        count = partial(length, tokenizer)
        return document(tokens=self.tokens, facts=self.questions + 1, count=count, seed=seed)

    def exchange(self, subject: Subject, plans: Sequence[str], seed: int) -> tuple[str, dict[str, str]]:
        """Ask the first question of a document under several plans: the question, and each plan's reply."""
        made = self.document(subject.tokenizer, seed)
        asked = self._prompts(subject.tokenizer, made)[:1]
        read = read_once(subject, plans, [asked[0].context])
        said = {}
        for plan in plans:
            rows = read.under(plan)
            rows.fold()
            said[plan] = reply(subject.tokenizer, _asked(subject, rows, asked)[0].tokens)
        return made.facts[0].question, said

    def _prompts(self, tokenizer: Any, made: Document) -> list[Prompt]:
        return [
            prompt(
                tokenizer,
                f"{made.text}\n{fact.question}",
                question=fact.question,
                seen=False,
                reply_tokens=REPLY_TOKENS,
                begun=fact.begun,
            )
            for fact in made.facts[: self.questions]
        ]


def _asked(subject: Subject, rows: Reader, prompts: Sequence[Prompt]) -> list[Answer]:
    """Put each question to the same fold."""
    return [answer for one in prompts for answer in ask_rows(subject, rows, [one])]


def _outcome(subject: Subject, made: Document, answers: Sequence[Answer], whole: Sequence[Sequence[int]]) -> Outcome:
    """Score the replies to one document; its sizes and pace are those of the last question's."""
    found = [
        float(fact.answer in reply(subject.tokenizer, answer.tokens))
        for fact, answer in zip(made.facts, answers, strict=False)
    ]
    alike = [float(answer.tokens == full) for answer, full in zip(answers, whole, strict=True)]
    metrics = answers[-1].metrics | {"agreement": fmean(alike)}
    return Outcome(family="facts", score=fmean(found), metrics=metrics, **answers[-1].fields)


SUITE = FactsSuite()
