"""mtbench101: does a model still do what a conversation asks of it when its history is folded?

MT-Bench-101's dialogues: the history is golden, each turn's own reply is judged from 1 to 10, a dialogue's score is
that of its worst turn, a task's the mean of its dialogues, an ability's the mean of its tasks (Bai et al.,
https://arxiv.org/abs/2402.14762). In six of the thirteen tasks the first turn only sets the scene. The wording of the
judge's prompt is ours. Version 1 is frozen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from kvfold.bench.judging.dialogues import TASKS, JudgedDialogue, JudgedTurn, ability_scores
from kvfold.bench.judging.rubric import judge_task
from kvfold.bench.judging.suite import JudgedSuite
from kvfold.bench.suite import Outcome
from kvfold.data.files import read_rows
from kvfold.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class MTBench101(JudgedSuite):
    """Thirteen tasks, three abilities. Nothing in it changes."""

    name = "mtbench101"
    version = 1
    rows = 16
    data_file = "mtbench101.jsonl.xz"

    def dialogues(self, path: Path) -> list[JudgedDialogue]:
        """Every dialogue of the published file."""
        rows = read_rows(path, fields=("task", "id", "history"))
        return [_dialogue(row, where=f"{path}, row {number}") for number, row in enumerate(rows, 1)]

    def prompt(self, dialogue: JudgedDialogue, turn: int, replies: Sequence[str]) -> list[dict[str, str]]:
        """The golden history, this turn's question, and the model's reply to it."""
        history = [(earlier.question, earlier.reply or "") for earlier in dialogue.turns[:turn]]
        asked = dialogue.turns[turn]
        return judge_task(dialogue.task, history, asked.question, replies[-1], asked.reference)

    def of_dialogue(self, scores: Sequence[float]) -> float:
        """The worst turn."""
        return min(scores)

    def of_turns(self, scores: Sequence[float]) -> dict[str, float]:
        """The mean turn."""
        return {"turn_average": fmean(scores)}

    def metrics(self, outcomes: Sequence[Outcome]) -> Mapping[str, float]:
        """The mean turn, the mean task, and the abilities of both levels."""
        by_task: dict[str, list[float]] = {}
        for outcome in outcomes:
            by_task.setdefault(outcome.family, []).append(outcome.score)
        turns = fmean(outcome.metrics["turn_average"] for outcome in outcomes)
        return {"turn_average": turns} | ability_scores({task: fmean(each) for task, each in by_task.items()})


def _dialogue(row: Mapping, *, where: str) -> JudgedDialogue:
    try:
        task = TASKS[row["task"]]
        turns = tuple(
            JudgedTurn(
                question=turn["user"],
                reply=turn["bot"],
                counts=i > 0 or not task.from_second,
                reference=turn["bot"] if task.with_reference else "",
            )
            for i, turn in enumerate(row["history"])
        )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where} was read as a dialogue of MT-Bench-101; {error} is not as it should be; rows hold `task` (one "
            f"of {', '.join(TASKS)}), `id` and `history` with `user` and `bot`"
        ) from None
    if not any(turn.counts for turn in turns):
        raise DataError(f"{where} was read as a dialogue of MT-Bench-101; it has no turn to judge; get a sound copy")
    return JudgedDialogue(name=f"{row['task']} {row['id']}", task=row["task"], turns=turns)


SUITE = MTBench101()
