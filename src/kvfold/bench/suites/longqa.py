"""longqa: questions on real documents, several on one folded document, the question unseen or seen when it folds.

Unseen: a document is read and folded once, and every question is asked of the same fold. Seen: the question is folded
with the document, so each question has a fold of its own. The score is token F1 of the reply, or the likelihood of the
reference answer, which says more about small models; records hold both. Version 1 is frozen.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from math import exp
from pathlib import Path
from typing import Any, Literal

from kvfold.bench.ask.asking import ask_rows, read_once, reply_likelihoods
from kvfold.bench.ask.prompts import Prompt, expected, prompt, reply, shortened
from kvfold.bench.ask.reader import Reader
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.data.dialogue import plain
from kvfold.data.files import prose, read_rows
from kvfold.errors import DataError, SuiteError

REPLY_TOKENS = 64
HEAD = "Read the text and answer the question about it."
ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question on one document, and the answer that people gave."""

    document: int
    text: str
    question: str
    answer: str
    family: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LongQaSuite(SharingSuite):
    """Questions on real documents. Nothing in it changes."""

    tokens: int = 4096  # of a document; what is longer is cut there
    question: Literal["seen", "unseen"] = "unseen"
    questions: int = 4  # asked of one document
    score: Literal["f1", "likelihood"] = "f1"
    answer: Literal["whole", "singly"] = "whole"  # how the reference answer is read when its likelihood is taken
    data: Path | None = None

    name = "longqa"
    version = 1
    data_file = "fairytaleqa.val.jsonl.xz"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.questions < 1:
            raise SuiteError(
                f"{self.questions} questions on {self.tokens} tokens were set; there is nothing to ask; set 1 or more"
            )

    @property
    def rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The questions of one document go together."""
        return self.questions

    @property
    def query_aware(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the question is folded with the document."""
        return self.question == "seen"

    def samples(self, *, n: int, seed: int) -> Sequence[Question]:
        """Documents in an order that follows from the seed, some questions of each; then again, never one twice."""
        if self.data is None:
            raise DataError(
                "suite longqa was asked for; it asks about real documents and brings none; "
                "give --data with rows of text or messages and qa"
            )
        rng = random.Random(f"longqa:{seed}")
        piles = [rng.sample(pile, len(pile)) for pile in _questions(self.data)]
        rng.shuffle(piles)
        rounds = max(map(len, piles)) // self.questions + 1
        steps = [slice(turn * self.questions, (turn + 1) * self.questions) for turn in range(rounds)]
        found = [question for step in steps for pile in piles for question in pile[step]]
        if n > len(found):
            raise SuiteError(f"{n} samples were asked for; {self.data.name} has {len(found)} questions; ask for fewer")
        return found[:n]

    def shortcut(self, samples: Sequence[Question]) -> None:
        """None: the floor is what can be said without the document."""

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[Question]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Read each document once, or once with each question; then fold, reply and score the reference."""
        numbered = enumerate(samples)
        for _, group in groupby(numbered, key=lambda one: one[1].document):
            questions = dict(group)
            whole = next(iter(questions.values())).text
            text = shortened(subject.tokenizer, whole, self.tokens)
            cut = float(text != whole)  # whether the document was longer than what was read
            prompts = {i: self._prompt(subject.tokenizer, text, question) for i, question in questions.items()}
            for numbers in self._on_one_fold(prompts):
                read = read_once(subject, plans, [prompts[numbers[0]].context])
                for plan in plans:
                    rows = read.under(plan)
                    rows.fold()
                    outcomes = {i: self._outcome(subject, rows, prompts[i], questions[i], cut) for i in numbers}
                    shared = read.shares(plan)
                    yield plan, {i: replace(one, shared_prefill=shared) for i, one in outcomes.items()}

    def _on_one_fold(self, prompts: Mapping[int, Prompt]) -> list[list[int]]:
        """The numbers of questions that are asked of one fold: all of a document, or each by itself."""
        if self.query_aware:
            return [[i] for i in prompts]
        assert len({one.context for one in prompts.values()}) == 1, "one fold serves one text"
        return [list(prompts)]

    def _outcome(self, subject: Subject, rows: Reader, asked: Prompt, question: Question, cut: float) -> Outcome:
        (answer,) = ask_rows(subject, rows, [asked])
        said = reply(subject.tokenizer, answer.tokens)
        likely = _likelihood(subject, rows, asked, question, singly=self.answer == "singly")
        f1 = token_f1(said, question.answer)
        metrics = {
            "f1": f1,
            "exact": float(_words(said) == _words(question.answer)),
            "log_likelihood": likely,
            "cut": cut,
        }
        score = f1 if self.score == "f1" else exp(likely)
        return Outcome(family=question.family, score=score, metrics=metrics | answer.metrics, **answer.cost)

    def _prompt(self, tokenizer: Any, text: str, question: Question) -> Prompt:
        last = f"Question: {question.question}"
        return prompt(
            tokenizer,
            f"{HEAD}\n\n{text}\n\n{last}",
            question=last,
            seen=self.query_aware,
            reply_tokens=REPLY_TOKENS,
            begun=_begun(tokenizer),
        )


def _likelihood(subject: Subject, rows: Reader, asked: Prompt, question: Question, *, singly: bool) -> float:
    """How likely the reference answer is in the reply's place, nats a token. The rows are afterwards as they were."""
    reference = expected(subject.tokenizer, question.answer, begun=_begun(subject.tokenizer))
    [mean] = reply_likelihoods(rows, [asked.question], [reference], singly=len(reference) if singly else 0)
    return mean


def token_f1(said: str, answer: str) -> float:
    """How much of the words two texts share, order, case, punctuation and articles apart."""
    first, second = Counter(_words(said)), Counter(_words(answer))
    shared = (first & second).total()
    return 2 * shared / (first.total() + second.total()) if shared else float(first == second)


def _words(text: str) -> list[str]:
    return [word for word in plain(text).split() if word not in ARTICLES]


def _begun(tokenizer: Any) -> str:
    """A model that was not made for chat is told that an answer comes now."""
    return "" if tokenizer.chat_template else "Answer:"


@cache
def _questions(path: Path) -> list[list[Question]]:
    """The questions of each document of a file that has some."""
    rows = read_rows(path, fields=("qa",))
    found = []
    for number, row in enumerate(rows):
        odd = [pair for pair in row["qa"] if not {"question", "answer"} <= pair.keys()]
        if odd or not ("text" in row or "messages" in row):
            raise DataError(
                f"{path} was given; its row {number + 1} holds no text or messages, or a question without answer; "
                "give rows of text and qa, a list of question and answer"
            )
        text = prose(row).strip()
        found.append(
            [
                Question(
                    document=number,
                    text=text,
                    question=" ".join(pair["question"].split()),
                    answer=" ".join(pair["answer"].split()),
                    family=pair.get("kind", "question"),
                )
                for pair in row["qa"]
                if pair["answer"].strip()
            ]
        )
    if not any(found):
        raise DataError(f"{path} was given; none of its rows asks a question; give rows whose qa has some")
    return [questions for questions in found if questions]


SUITE = LongQaSuite()
