"""ruler: the task kinds of RULER, generated at any length, or ready prompts from a file.

Without `--data`, eleven kinds over generated prose; with rows of text and questions, all thirteen over that text; with
rows of ready prompts (`task`, `prompt`, `answer_prefix`, `outputs`), those as they are. Scored as RULER does: the share
of the outputs that the reply holds, for questions on documents whether it holds any. Version 1 is frozen.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from kvfold.bench.ask.asking import Answer, ask_each
from kvfold.bench.ask.prompts import length, prompt, reply
from kvfold.bench.choices import as_json
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.data.excerpts import Source, source
from kvfold.data.files import read_rows
from kvfold.data.ruler import QUESTIONS, TASKS, Task, generate
from kvfold.errors import DataError, SuiteError

READY = ("task", "prompt", "answer_prefix", "outputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A task that is written when it is asked: its length is counted by the model's own tokenizer."""

    kind: str
    tokens: int
    seed: int
    data: Path | None

    def task(self, tokenizer: Any) -> Task:
        """The task as this tokenizer measures it."""
        count = partial(length, tokenizer)
        return generate(self.kind, tokens=self.tokens, count=count, seed=self.seed, source=_source(self.data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A task that somebody wrote."""

    made: Task

    def task(self, tokenizer: Any) -> Task:
        """The task as it is, whoever reads it."""
        return self.made


@dataclass(frozen=True, slots=True, kw_only=True)
class RulerSuite(SharingSuite):
    """The tasks of RULER. Nothing in it changes."""

    tokens: int = 4096  # of prompt and reply; ready prompts are as long as they are
    question: Literal["seen", "unseen"] = "unseen"
    tasks: tuple[str, ...] = ()  # none named: all that the data has
    data: Path | None = None

    name = "ruler"
    version = 1
    rows = 6
    opens_with = 1

    def __post_init__(self) -> None:
        odd = [task for task in self.tasks if task not in TASKS]
        if odd:
            raise SuiteError(f"tasks {', '.join(odd)} were set; RULER has {', '.join(TASKS)}; set some of these")

    @property
    def data_file(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The ready prompts of this length."""
        return f"ruler.{self.tokens}.jsonl.xz"

    @property
    def query_aware(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the question is folded with the text before it."""
        return self.question == "seen"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was chosen, the tasks by name; the length only where the suite chooses it."""
        chosen = as_json(self) | {"tasks": list(self._kinds())}
        return {name: value for name, value in chosen.items() if name != "tokens" or not self._is_ready()}

    def samples(self, *, n: int, seed: int) -> Sequence[Recipe | Ready]:
        """The tasks in turn; ready prompts in an order that follows from the seed, none twice."""
        kinds = self._kinds()
        if self._is_ready():
            return self._drawn(kinds, n=n, seed=seed)
        return [
            Recipe(kind=kinds[i % len(kinds)], tokens=self.tokens, seed=seed * 1_000_003 + i, data=self.data)
            for i in range(n)
        ]

    def shortcut(self, samples: Sequence[Recipe | Ready]) -> None:
        """None: RULER names none."""

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[Recipe | Ready]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Write and feed, then fold and ask under every plan; the reply is made to begin as RULER begins it."""
        tasks = [sample.task(subject.tokenizer) for sample in samples]
        prompts = [
            prompt(
                subject.tokenizer,
                task.prompt,
                question=task.question,
                seen=self.query_aware,
                reply_tokens=task.reply_tokens,
                begun=task.answer_prefix.strip(),
            )
            for task in tasks
        ]
        for plan, answers in ask_each(subject, plans, prompts):
            yield plan, {i: _outcome(subject, tasks[i], answer) for i, answer in answers.items()}

    def _is_ready(self) -> bool:
        return self.data is not None and bool(_ready(self.data))

    def _kinds(self) -> tuple[str, ...]:
        """The tasks that were set, or all there are. Raises DataError for one that the data has not."""
        if self._is_ready():
            assert self.data is not None
            has = tuple(task for task in TASKS if any(one.task == task for one in _ready(self.data)))
        else:
            has = TASKS if _source(self.data).questions else tuple(task for task in TASKS if task not in QUESTIONS)
        missing = [task for task in self.tasks if task not in has]
        if missing:
            raise DataError(
                f"tasks {', '.join(missing)} were set; this data has {', '.join(has)}; "
                "give --data with such prompts, or for qa with texts and their questions"
            )
        return self.tasks or has

    def _drawn(self, kinds: Sequence[str], *, n: int, seed: int) -> list[Ready]:
        assert self.data is not None
        rng = random.Random(f"ruler:{seed}")
        piles = [[one for one in _ready(self.data) if one.task == kind] for kind in kinds]
        if n > sum(map(len, piles)):
            raise SuiteError(f"{n} samples were asked for; {self.data.name} has {sum(map(len, piles))}; ask for fewer")
        piles = [rng.sample(pile, len(pile)) for pile in piles]
        turns = [pile[turn] for turn in range(max(map(len, piles))) for pile in piles if turn < len(pile)]
        return [Ready(made=task) for task in turns[:n]]


def _outcome(subject: Subject, task: Task, answer: Answer) -> Outcome:
    return Outcome(
        family=task.task,
        score=task.score(reply(subject.tokenizer, answer.tokens)),
        metrics=answer.metrics,
        **answer.fields,
    )


@cache
def _source(path: Path | None) -> Source:
    return Source() if path is None else source(read_rows(path))


@cache
def _ready(path: Path) -> tuple[Task, ...]:
    """The prompts of a file of ready ones; none where it is a file of text."""
    rows = read_rows(path)
    if "prompt" not in rows[0]:
        return ()
    for number, row in enumerate(read_rows(path, fields=READY), 1):
        outputs = row["outputs"]
        sound = isinstance(outputs, list) and outputs and all(isinstance(one, str) for one in outputs)
        if row["task"] not in TASKS or not sound:
            raise DataError(
                f"{path} was given; its row {number} is of task {row['task']!r} with the outputs {outputs!r}; "
                f"give rows of {', '.join(TASKS)} with a list of texts, one or more"
            )
    return tuple(
        Task(
            task=row["task"],
            prompt=row["prompt"].rstrip(),
            answer_prefix=row["answer_prefix"],
            outputs=tuple(row["outputs"]),
        )
        for row in rows
    )


SUITE = RulerSuite()
