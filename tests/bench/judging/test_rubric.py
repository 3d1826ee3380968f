import pytest

from kvfold.bench.judging import rubric
from kvfold.bench.judging.dialogues import TASKS, ability_scores

HISTORY = [("Who wrote Emma?", "Jane Austen did.")]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good. Rating: [[8]]", 8.0),
        ("[[ 7.5 ]]", 7.5),
        ("Rating: [[9/10]]", 9.0),
        ("An example is [[5]], but mine: [[2]]", 2.0),
        ("Rating: 8", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[good]]", None),
        ("", None),
    ],
)
def test_the_last_grade_from_1_to_10_in_double_brackets_counts(text, score):
    assert rubric.rating(text) == score


def test_every_task_has_criteria_of_its_own():
    assert rubric.CRITERIA.keys() == TASKS.keys()
    assert len(set(rubric.CRITERIA.values())) == len(TASKS) == 13


@pytest.mark.parametrize("task", TASKS)
def test_the_judge_sees_the_history_the_question_and_the_reply_and_knows_which_is_graded(task):
    system, user = rubric.judge_task(task, HISTORY, "And when?", "In 1815.", "")
    assert rubric.CRITERIA[task] in system["content"]
    assert "[[5]]" in system["content"]
    texts = ["Who wrote Emma?", "Jane Austen did.", "And when?", "In 1815."]
    places = [user["content"].index(text) for text in texts]
    assert places == sorted(places)
    assert user["content"].count("to be graded") == 1
    assert user["content"].index("to be graded") > places[2]
    assert "reference" not in user["content"]


def test_a_reference_is_shown_where_there_is_one():
    shown = rubric.judge_quality(HISTORY, "And when?", "In 1915.", "1815")[1]["content"]
    assert shown.endswith("<<a reference answer, for you alone>>\n1815")


def test_an_empty_reply_is_shown_as_nothing():
    assert rubric.judge_quality([], "And when?", "  ", "")[1]["content"].endswith("to be graded>>\n(nothing)")


def test_abilities_are_means_over_tasks_in_the_papers_three_levels():
    fine = {task.fine for task in TASKS.values()}
    assert len(fine) == 7
    assert {task.ability for task in TASKS.values()} == {"perceptivity", "adaptability", "interactivity"}
    scores = ability_scores({"CM": 4.0, "AR": 6.0, "SI": 8.0, "IC": 2.0})
    assert scores == {
        "task_average": 5.0,
        "perceptivity": 6.0,
        "memory": 4.0,
        "understanding": 7.0,
        "interactivity": 2.0,
        "questioning": 2.0,
    }
