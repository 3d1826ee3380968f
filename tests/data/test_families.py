"""Dialogues: what is promised of every scored question, held on both halves."""

import statistics
from functools import cache

import pytest

from kvfold.data import FAMILIES, best_shortcut, dialogue, training_dialogue
from kvfold.errors import DataError

MANY = 300


@cache
def asked(family, split="heldout", n=MANY):
    return [dialogue(family, split=split, turns=16 + seed % 9, seed=seed) for seed in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_canonical_reply_is_right_and_shortcuts_mostly_are_not(family, split):
    samples = asked(family, split)
    assert all(one.correct(one.reply) for one in samples)
    assert not any(one.correct("") or one.correct("I do not know.") for one in samples)
    assert best_shortcut(samples) < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_question_is_a_collision(family):
    assert all(one.holders >= 2 for one in asked(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_telling_and_asking_are_at_least_eight_turns_apart_in_the_median(family):
    distances = [one.distance for one in asked(family)]
    assert statistics.median(distances) >= 8
    assert min(distances) >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_history_has_the_turns_asked_for_and_ends_with_the_question(family):
    one = dialogue(family, split="heldout", turns=16, seed=3)
    roles = [message.role for message in one.messages]
    assert roles == ["user", "assistant"] * 15 + ["user"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_was_never_replied_before(family):
    for one in asked(family):
        scripted = [message.content for message in one.messages if message.role == "assistant"]
        assert one.reply not in scripted


@pytest.mark.parametrize("family", ["recall", "coreference", "arithmetic"])
def test_a_family_has_more_than_two_hundred_answers(family):
    answers = {one.answer for one in asked(family, n=700)}
    assert len(answers) >= 200


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dialogue_is_a_pure_function_of_its_settings(family):
    first = dialogue(family, split="heldout", turns=18, seed=5)
    assert first == dialogue(family, split="heldout", turns=18, seed=5)
    assert first != dialogue(family, split="heldout", turns=18, seed=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_dialogues_score_questions_and_only_replies(family):
    messages = training_dialogue(family, turns=12, seed=1)
    weights = {message.role: {other.weight for other in messages if other.role == message.role} for message in messages}
    assert weights["user"] == {0.0}
    assert 1.0 in weights["assistant"] <= {0.1, 1.0}
    assert messages[-1].weight == 1.0


def test_an_updated_fact_counts_with_its_last_value():
    rivals = 0
    for one in asked("recall"):
        told = [message.content for message in one.messages if message.role == "user" and one.answer in message.content]
        assert len(told) == 1
        rivals += any("is now" in text for text in told)
    assert rivals > MANY // 20


def test_a_reply_with_a_rival_or_half_a_value_is_wrong():
    one = next(one for one in asked("recall") if " " in one.answer and one.judge.rivals)
    assert not one.correct(f"{one.reply} Or {one.judge.rivals[0]}.")
    assert not one.correct(one.reply.replace(one.answer, one.answer.split()[-1]))


def test_a_styled_reply_needs_its_style_and_its_topic():
    capitals = next(one for one in asked("rules") if one.judge.how == "capitals")
    assert not capitals.correct(capitals.reply.lower())
    assert not capitals.correct("I LIKE IT VERY MUCH.")
    begins = next(one for one in asked("rules") if one.judge.how == "begins")
    assert not begins.correct(begins.reply.upper())
    assert not begins.correct(f"I like {begins.judge.topic} very much, {begins.judge.answer}.")


def test_a_secret_word_said_is_wrong():
    secret = next(one for one in asked("rules") if "say" in one.reply and one.judge.rivals)
    assert not any(secret.correct(f"For it I say {rival}.") for rival in secret.judge.rivals)


@pytest.mark.parametrize(
    ("family", "split", "turns", "what"),
    [("memory", "train", 4, "coreference"), ("recall", "test", 4, "heldout"), ("recall", "train", 1, "at least 2")],
)
def test_what_cannot_be_generated_says_what_can(family, split, turns, what):
    with pytest.raises(DataError, match=what):
        dialogue(family, split=split, turns=turns, seed=0)
