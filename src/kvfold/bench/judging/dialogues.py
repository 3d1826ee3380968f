"""A dialogue as suites with a judge see it: its questions, its history, and the replies that are judged.

It also holds the thirteen tasks of MT-Bench-101 with the abilities they belong to, in its paper's three levels: three
abilities, seven finer ones, thirteen tasks (Bai et al., https://arxiv.org/abs/2402.14762). No model, no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedTurn:
    """One question of a user, and how its reply is judged."""

    question: str
    reply: str | None  # in the history; None: whatever the model replied
    counts: bool = True  # is the model's reply judged
    reference: str = ""  # a good answer for the judge to compare with, where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedDialogue:
    """One dialogue of a published set."""

    name: str
    task: str
    turns: tuple[JudgedTurn, ...]

    @property
    def judged_turns(self) -> tuple[int, ...]:
        """The numbers of the turns whose replies are judged."""
        return tuple(i for i, turn in enumerate(self.turns) if turn.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedTask:
    """One kind of dialogue in MT-Bench-101."""

    title: str
    fine: str  # the finer ability
    ability: str
    from_second: bool = False  # the first turn only sets the scene, its reply is not judged
    with_reference: bool = False  # the judge sees the golden reply


TASKS: Mapping[str, JudgedTask] = {
    "CM": JudgedTask(title="context memory", fine="memory", ability="perceptivity", from_second=True),
    "AR": JudgedTask(title="anaphora resolution", fine="understanding", ability="perceptivity", from_second=True),
    "SI": JudgedTask(title="separate input", fine="understanding", ability="perceptivity"),
    "TS": JudgedTask(title="topic shift", fine="interference", ability="perceptivity"),
    "CC": JudgedTask(title="content confusion", fine="interference", ability="perceptivity"),
    "CR": JudgedTask(title="content rephrasing", fine="rephrasing", ability="adaptability", from_second=True),
    "FR": JudgedTask(title="format rephrasing", fine="rephrasing", ability="adaptability", from_second=True),
    "SC": JudgedTask(title="self-correction", fine="reflection", ability="adaptability", from_second=True),
    "SA": JudgedTask(title="self-affirmation", fine="reflection", ability="adaptability", from_second=True),
    "MR": JudgedTask(title="mathematical reasoning", fine="reasoning", ability="adaptability", with_reference=True),
    "GR": JudgedTask(title="general reasoning", fine="reasoning", ability="adaptability", with_reference=True),
    "IC": JudgedTask(title="instruction clarification", fine="questioning", ability="interactivity"),
    "PI": JudgedTask(title="proactive interaction", fine="questioning", ability="interactivity"),
}


def ability_scores(by_task: Mapping[str, float]) -> dict[str, float]:
    """Average the tasks of each ability, of both levels, and all; only tasks that are there."""
    groups: dict[str, list[float]] = {}
    for name, score in by_task.items():
        for group in ("task_average", TASKS[name].ability, TASKS[name].fine):
            groups.setdefault(group, []).append(score)
    return {group: sum(scores) / len(scores) for group, scores in groups.items()}
