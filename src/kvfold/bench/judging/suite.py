"""The suites of judged dialogues: replies that are made once, and a score with or without a judge.

With a judge, the score of a dialogue is what the judge says. Without one there is no grade of quality, and none is made
up: the score is then the agreement with the replies of the full cache, the share of a reply up to the first token that
differs, and records say so (`scored_by`). Replies and judgements are kept in the folder of the records.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kvfold.bench.choices import as_json
from kvfold.bench.judging.dialogues import JudgedDialogue
from kvfold.bench.judging.endpoint import Endpoint
from kvfold.bench.judging.judge import Judge
from kvfold.bench.judging.notebook import Notebook, key_of, open_notebook
from kvfold.bench.judging.replies import Replies, replies_each
from kvfold.bench.judging.rubric import VERSION
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.errors import DataError, SuiteError

REPLIES, JUDGEMENTS = "replies.jsonl", "judgements.jsonl"
FULL = "full"
_NOT_RECORDED = ("judge_url", "judge_model", "judge_seconds", "judge_tries", "judge_pause", "judge_at_a_time", "folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedSuite(SharingSuite):
    """Dialogues that a model replies to and a judge grades."""

    data: Path | None = None
    reply_tokens: int = 128  # the longest reply
    words: int | None = None  # only dialogues of at most so many words
    judge_url: str = ""
    judge_model: str = ""
    judge_seconds: float = 60.0  # how long the judge may be silent
    judge_tries: int = 4
    judge_pause: float = 1.0  # seconds before the second try, doubled before each further one
    judge_at_a_time: int = 4
    folder: Path | None = None  # for replies and judgements; the folder of the records, where the command line runs it

    def __post_init__(self) -> None:
        if bool(self.judge_url) != bool(self.judge_model):
            raise SuiteError(
                f"judge_url={self.judge_url!r} and judge_model={self.judge_model!r} were given; a judge needs both an "
                "address and a name; give --judge-url and --judge-model, or neither"
            )
        if self.reply_tokens < 1 or self.judge_at_a_time < 1:
            raise SuiteError(
                f"reply_tokens={self.reply_tokens} and judge_at_a_time={self.judge_at_a_time} were given; nothing is "
                "said or judged by less than one; give 1 or more"
            )
        if self.judge_url:
            self._endpoint()

    @property
    def settings(self) -> Mapping[str, Any]:
        """Give what shapes dialogues and scores; a judge by its name and not by its address."""
        chosen = {name: value for name, value in as_json(self).items() if name not in _NOT_RECORDED}
        judge = (
            f"{self.judge_model}, rubric {VERSION}" if self.judge_model else "agreement with the full cache's replies"
        )
        return chosen | {"scored_by": judge}

    def bound_to(self, folder: Path) -> "JudgedSuite":
        """Give a copy that keeps replies and judgements in that folder, unless another was chosen."""
        return self if self.folder is not None else replace(self, folder=folder)

    def samples(self, *, n: int, seed: int) -> Sequence[JudgedDialogue]:
        """Draw dialogues from the file, the families in turn, which of each by the seed."""
        if self.data is None:
            raise DataError(
                f"{self.name} was asked for; its dialogues are not part of kvfold; "
                f"give --data with the folder that holds {self.data_file}"
            )
        dialogues = [
            dialogue for dialogue in self.dialogues(self.data) if self.words is None or _words(dialogue) <= self.words
        ]
        if n > len(dialogues):
            short = "" if self.words is None else f" of at most {self.words} words"
            raise SuiteError(
                f"{n} dialogues were asked for; {self.data.name} holds {len(dialogues)}{short}; give at most so many"
            )
        return _in_turn(dialogues, seed=seed)[:n]

    def shortcut(self, samples: Sequence[JudgedDialogue]) -> None:
        """Give None: no shortcut could be measured."""

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[JudgedDialogue]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Reply, or find the replies of an earlier run, and score them; what precedes the first fold is made once."""
        needed = list(plans) if self.judge_url else list(dict.fromkeys([FULL, *plans]))  # full is compared with
        full: list[Replies] = []
        for plan, made in self._replies(subject, needed, samples):
            full = made if plan == FULL else full
            if plan not in plans:
                continue
            scores = self._judged(samples, made) if self.judge_url else _agreement(made, full)
            outcomes = [
                Outcome(family=dialogue.task, score=self.of_dialogue(each), metrics=self.of_turns(each), **one.cost)
                for dialogue, one, each in zip(samples, made, scores, strict=True)
            ]
            yield plan, dict(enumerate(outcomes))

    @abstractmethod
    def dialogues(self, path: Path) -> list[JudgedDialogue]:
        """Every dialogue of a file. Raises DataError for a file of another kind."""

    @abstractmethod
    def prompt(self, dialogue: JudgedDialogue, turn: int, replies: Sequence[str]) -> list[dict[str, str]]:
        """Word the judge's prompt about one turn; `replies` are those of the judged turns, up to this one."""

    @abstractmethod
    def of_dialogue(self, scores: Sequence[float]) -> float:
        """Score a dialogue from the scores of its turns."""

    @abstractmethod
    def of_turns(self, scores: Sequence[float]) -> dict[str, float]:
        """Give further metrics of the turns' scores, by their keys in records."""

    def _endpoint(self) -> Endpoint:
        return Endpoint(
            url=self.judge_url,
            model=self.judge_model,
            limit_seconds=self.judge_seconds,
            tries=self.judge_tries,
            pause_seconds=self.judge_pause,
        )

    def _notebook(self, name: str) -> Notebook | None:
        return None if self.folder is None else open_notebook(self.folder / name)

    def _replies(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[JudgedDialogue]
    ) -> Iterator[tuple[str, list[Replies]]]:
        """The replies under each plan, as they become known; those in the notebook are not made again."""
        notebook = self._notebook(REPLIES)
        keys = {plan: self._keys(subject, plan, samples) for plan in plans}
        found: dict[str, dict[int, Replies]] = {}
        lacking: dict[tuple[int, ...], list[str]] = {}  # plans that lack the same dialogues
        for plan in plans:
            entries = [None if notebook is None else notebook.find(key) for key in keys[plan]]
            found[plan] = {i: Replies.from_json(entry) for i, entry in enumerate(entries) if entry is not None}
            lacking.setdefault(tuple(i for i, entry in enumerate(entries) if entry is None), []).append(plan)
        for missing, which in sorted(lacking.items(), key=lambda each: FULL not in each[1]):
            if not missing:
                yield from ((plan, _in_order(found[plan])) for plan in which)
                continue
            chosen = [samples[i] for i in missing]
            for plan, fresh in replies_each(subject, which, chosen, reply_tokens=self.reply_tokens):
                found[plan] |= {missing[at]: one for at, one in fresh.items()}
                if notebook is not None:
                    where = {"suite": self.name, "model": subject.name, "plan": plan}
                    for at, one in fresh.items():
                        entry = where | {"dialogue": chosen[at].name} | one.as_json()
                        notebook.write(keys[plan][missing[at]], entry)
                if len(found[plan]) == len(samples):
                    yield plan, _in_order(found[plan])

    def _keys(self, subject: Subject, plan: str, samples: Sequence[JudgedDialogue]) -> list[str]:
        setting = [subject.fingerprint, subject.dtype, subject.device, plan, self.version, self.reply_tokens]
        return [key_of(*setting, asdict(dialogue)) for dialogue in samples]

    def _judged(self, samples: Sequence[JudgedDialogue], made: Sequence[Replies]) -> list[list[float]]:
        judge = Judge(endpoint=self._endpoint(), notebook=self._notebook(JUDGEMENTS), at_a_time=self.judge_at_a_time)
        prompts = [
            [self.prompt(dialogue, turn, one.texts[: i + 1]) for i, turn in enumerate(dialogue.judged_turns)]
            for dialogue, one in zip(samples, made, strict=True)
        ]
        scores = iter(judge.scores([prompt for each in prompts for prompt in each]))
        return [[next(scores) for _ in each] for each in prompts]


def _in_order(found: Mapping[int, Replies]) -> list[Replies]:
    """The replies by the number of their dialogue."""
    return [found[number] for number in sorted(found)]


def _agreement(made: Sequence[Replies], full: Sequence[Replies]) -> list[list[float]]:
    """How far the replies to each dialogue agree with those of the full cache."""
    return [
        [agreement(reply, full_reply) for reply, full_reply in zip(one.tokens, other.tokens, strict=True)]
        for one, other in zip(made, full, strict=True)
    ]


def agreement(reply: Sequence[int], full: Sequence[int]) -> float:
    """Give the share of the longer of two replies that stands before the first token in which they differ."""
    longest = max(len(reply), len(full))
    same = 0
    for token, full_token in zip(reply, full, strict=False):
        if token != full_token:
            break
        same += 1
    return same / longest if longest else 1.0


def _words(dialogue: JudgedDialogue) -> int:
    return sum(len(turn.question.split()) + len((turn.reply or "").split()) for turn in dialogue.turns)


def _in_turn(dialogues: Sequence[JudgedDialogue], *, seed: int) -> list[JudgedDialogue]:
    """One of each family, then the next of each, in an order that the seed decides."""
    order = sorted(range(len(dialogues)), key=lambda i: key_of(seed, i, dialogues[i].name))
    by_family: dict[str, list[JudgedDialogue]] = {dialogue.task: [] for dialogue in dialogues}
    for i in order:
        by_family[dialogues[i].task].append(dialogues[i])
    rounds = zip_longest(*by_family.values())  # one of each family; None where a family has no more
    return [dialogue for each in rounds for dialogue in each if dialogue is not None]
