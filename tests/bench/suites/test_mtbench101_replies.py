"""mtbench101_replies: golden replies of later turns, and how likely they are."""

import json
from math import exp

import pytest
from strangers import stranger

from kvfold.bench.choices import choose
from kvfold.bench.suites import find
from kvfold.bench.suites.mtbench101_replies import SUITE
from kvfold.errors import DataError

TURNS = [("Who is tall?", "Anna is."), ("Who else?", "Tom is tall too."), ("And who is small?", "Only Eve.")]


@pytest.fixture
def suite(tmp_path):
    history = [{"user": question, "bot": reply} for question, reply in TURNS]
    rows = [{"task": task, "id": number, "history": history} for number, task in enumerate(("GR", "CM", "TS"))]
    path = tmp_path / "dialogues.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return choose(SUITE, data=path)


def test_every_reply_but_the_first_is_asked_whole(suite):
    for sample in suite.samples(n=3, seed=0):
        asked = [sample.messages[value.message].content[value.start : value.end] for value in sample.values]
        assert asked == [reply for _, reply in TURNS[1:]]


def test_the_full_cache_is_the_ceiling_and_scores_are_likelihoods(suite):
    assert find("mtbench101-replies") is SUITE
    samples = suite.samples(n=3, seed=0)
    full, none = (suite.ask(stranger(), plan, samples) for plan in ("full", "none"))
    for outcome in (*full, *none):
        assert outcome.score == pytest.approx(exp(outcome.metrics["value_log_likelihood"]))
    assert suite.metrics(full)["kl"] == 0.0
    assert suite.metrics(none)["kl"] > 0.01


def test_without_data_it_says_what_to_give():
    with pytest.raises(DataError, match="give --data"):
        SUITE.samples(n=1, seed=0)
