"""lm-eval: any task of the Language Model Evaluation Harness, each number through the folded cache.

The prompt of a document is folded, its last token apart; choices are scored on what was kept, answers generated from
it. Prompts and scores are lm_eval's (https://github.com/EleutherAI/lm-evaluation-harness); elsewhere such tasks never
touch a cache. The question is part of what is folded, so plans that look at queries see it. Version 1 is frozen.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from kvfold.bench.choices import as_json
from kvfold.bench.run.record import KEYS
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, Suite
from kvfold.errors import SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document of a task."""

    task: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEval(Suite):
    """Tasks by name, or as YAML files. Nothing in it changes."""

    tasks: tuple[str, ...] = ()
    metric: str = ""  # the score; empty: each task's first
    shots: int | None = None  # examples in the prompt; None: what the task says
    chat: bool = False  # prompts through the tokenizer's chat template
    stride: int = 64  # a longer continuation goes on folding after each so many tokens

    name = "lm-eval"
    version = 1
    rows = 32
    query_aware = True

    @property
    def settings(self) -> Mapping[str, Any]:
        """The tasks by name and digest, with those of their local data."""
        from kvfold.bench.harness.tasks import called, data_of

        files = [data for task in self._tasks().values() for data in data_of(task)]
        return as_json(self) | {"tasks": [called(spec) for spec in self.tasks], "files": files}

    def samples(self, *, n: int, seed: int) -> Sequence[Document]:
        """The tasks in turn, which documents of each by the seed."""
        orders = []
        for name, task in self._tasks().items():
            indices = list(range(len(task.eval_docs)))
            random.Random(f"{seed} {name}").shuffle(indices)
            orders.append([Document(task=name, index=index) for index in indices])
        longest = max(map(len, orders))
        every = [order[i] for i in range(longest) for order in orders if i < len(order)]
        if n > len(every):
            raise SuiteError(f"{n} documents were asked for; these tasks have {len(every)}; give at most so many")
        return every[:n]

    def shortcut(self, samples: Sequence[Document]) -> None:
        """None is known for tasks in general."""

    def ask(self, subject: Subject, plan: str, samples: Sequence[Document]) -> list[Outcome]:
        """Each task's documents together."""
        from kvfold.bench.harness.model import FoldedLM
        from kvfold.bench.harness.scoring import Costs
        from kvfold.bench.harness.tasks import chosen_metric, results

        model = FoldedLM(subject, plan, stride=self.stride, batch_size=self.rows)
        found: dict[Document, Outcome] = {}
        for name in dict.fromkeys(sample.task for sample in samples):
            task = self._tasks()[name]
            metric = chosen_metric(task, self.metric)
            indices = [sample.index for sample in samples if sample.task == name]
            model.scorer.costs = Costs()  # of this task alone
            every = results(task, indices, model, chat=self.chat)
            cost = model.scorer.costs.mean()
            for index, values in every.items():
                found[Document(task=name, index=index)] = _outcome(name, values, metric, cost)
        return [found[sample] for sample in samples]

    def _tasks(self) -> Mapping[str, Any]:
        if find_spec("lm_eval") is None:
            raise SuiteError("lm-eval was asked for; lm_eval is not installed; install kvfold[lm-eval]")
        if not self.tasks:
            raise SuiteError("lm-eval was asked for; no task was named; give --set tasks=NAME or FILE.yaml")
        from kvfold.bench.harness.tasks import load

        return load(self.tasks, self.shots)


def _outcome(task: str, values: Mapping[str, Any], metric: str, cost: Mapping[str, Any]) -> Outcome:
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    if metric not in numbers:
        raise SuiteError(
            f"{metric} of the task {task} was to be the score; it is no number of one document; give --set metric= one "
            f"of {', '.join(numbers) or 'none'}, or use lm_eval's own command: python -m kvfold.bench.harness"
        )
    others = {name: value for name, value in numbers.items() if name not in KEYS}
    return Outcome(family=task, score=numbers[metric], metrics=others, **cost)


SUITE = LmEval()
