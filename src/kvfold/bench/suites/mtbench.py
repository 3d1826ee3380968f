"""mtbench: eighty questions with a follow-up each, answered by a model whose first turn was folded.

MT-Bench's two-turn questions in eight categories: the model's own first reply stays in the history, both replies are
judged from 1 to 10, a question's score is their mean (Zheng et al., https://arxiv.org/abs/2306.05685). Where the set
has a reference answer, the judge sees it. The wording of the judge's prompt is ours. Version 1 is frozen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from kvfold.bench.judging.dialogues import JudgedDialogue, JudgedTurn
from kvfold.bench.judging.rubric import judge_quality
from kvfold.bench.judging.suite import JudgedSuite
from kvfold.data.files import read_rows
from kvfold.errors import DataError

_TURNS = ("first_turn", "second_turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class MTBench(JudgedSuite):
    """Eight categories of open questions. Nothing in it changes."""

    name = "mtbench"
    version = 1
    rows = 16
    data_file = "mtbench.jsonl.xz"

    def dialogues(self, path: Path) -> list[JudgedDialogue]:
        """Every question of the published file."""
        rows = read_rows(path, fields=("question_id", "category", "turns"))
        return [_dialogue(row, where=f"{path}, row {number}") for number, row in enumerate(rows, 1)]

    def prompt(self, dialogue: JudgedDialogue, turn: int, replies: Sequence[str]) -> list[dict[str, str]]:
        """The model's own history, this turn's question, and its reply."""
        history = [(earlier.question, reply) for earlier, reply in zip(dialogue.turns[:turn], replies, strict=False)]
        asked = dialogue.turns[turn]
        return judge_quality(history, asked.question, replies[-1], asked.reference)

    def of_dialogue(self, scores: Sequence[float]) -> float:
        """The mean of both turns."""
        return fmean(scores)

    def of_turns(self, scores: Sequence[float]) -> dict[str, float]:
        """Each turn: only the second has a folded history."""
        return dict(zip(_TURNS, scores, strict=True))


def _dialogue(row: Mapping, *, where: str) -> JudgedDialogue:
    questions, references = row["turns"], row.get("reference") or ["", ""]
    texts = [*questions, *references] if isinstance(questions, list) and isinstance(references, list) else []
    if len(texts) != 2 * len(_TURNS) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where} was read as a question of MT-Bench; its turns or references are not two texts; rows hold "
            "`question_id`, `category`, `turns` and, some of them, `reference`"
        )
    turns = [JudgedTurn(question=q, reply=None, reference=r) for q, r in zip(questions, references, strict=True)]
    return JudgedDialogue(name=str(row["question_id"]), task=str(row["category"]), turns=tuple(turns))


SUITE = MTBench()
