"""A dialogue as suites with a judge see it: what is asked, what stands in the history, which replies count.

It also holds the thirteen tasks of MT-Bench-101 with the abilities they belong to, in its paper's three levels: three
abilities, seven finer ones, thirteen tasks (Bai et al., https://arxiv.org/abs/2402.14762). No model, no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One thing that a user says."""

    question: str
    reply: str | None  # what the history holds as its reply; None: whatever the model replied
    counts: bool = True  # is the model's own reply judged
    reference: str = ""  # a good answer for the judge to compare with, where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """One dialogue."""

    name: str
    task: str
    turns: tuple[Turn, ...]

    @property
    def asked(self) -> tuple[int, ...]:
        """The turns whose replies count."""
        return tuple(i for i, turn in enumerate(self.turns) if turn.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kind of dialogue in MT-Bench-101."""

    title: str
    fine: str  # the finer ability
    ability: str
    from_second: bool = False  # the first turn only sets the scene, its reply is not judged
    with_reference: bool = False  # the judge sees the golden reply


TASKS: Mapping[str, Task] = {
    "CM": Task(title="context memory", fine="memory", ability="perceptivity", from_second=True),
    "AR": Task(title="anaphora resolution", fine="understanding", ability="perceptivity", from_second=True),
    "SI": Task(title="separate input", fine="understanding", ability="perceptivity"),
    "TS": Task(title="topic shift", fine="interference", ability="perceptivity"),
    "CC": Task(title="content confusion", fine="interference", ability="perceptivity"),
    "CR": Task(title="content rephrasing", fine="rephrasing", ability="adaptability", from_second=True),
    "FR": Task(title="format rephrasing", fine="rephrasing", ability="adaptability", from_second=True),
    "SC": Task(title="self-correction", fine="reflection", ability="adaptability", from_second=True),
    "SA": Task(title="self-affirmation", fine="reflection", ability="adaptability", from_second=True),
    "MR": Task(title="mathematical reasoning", fine="reasoning", ability="adaptability", with_reference=True),
    "GR": Task(title="general reasoning", fine="reasoning", ability="adaptability", with_reference=True),
    "IC": Task(title="instruction clarification", fine="questioning", ability="interactivity"),
    "PI": Task(title="proactive interaction", fine="questioning", ability="interactivity"),
}


def ability_scores(by_task: Mapping[str, float]) -> dict[str, float]:
    """The mean over the tasks of each ability, of both levels, and over all; only of tasks that are there."""
    groups: dict[str, list[float]] = {}
    for name, score in by_task.items():
        for group in ("task_average", TASKS[name].ability, TASKS[name].fine):
            groups.setdefault(group, []).append(score)
    return {group: sum(scores) / len(scores) for group, scores in groups.items()}
