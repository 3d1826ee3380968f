"""gsm8k_turns: premises are given one by one, some are corrected, and the numbers of the solution are asked for."""

import json

import pytest
from strangers import stranger

from kvfold.bench.choices import choose
from kvfold.bench.suites import find
from kvfold.bench.suites.gsm8k_turns import SUITE
from kvfold.data.premises import NOTED
from kvfold.errors import DataError


def problem(number):
    return {
        "question": f"Ann has {number} hats. She buys {number + 1} more.  How many hats has she?",
        "answer": f"She has {number}+{number + 1}=<<{number}+{number + 1}={2 * number + 1}>>{2 * number + 1} hats.\n"
        f"#### {2 * number + 1}",
    }


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [problem(number) for number in range(10, 40)] + [{"question": "One? Two?", "answer": "#### 2"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return choose(SUITE, data=path)


def test_each_premise_is_a_turn_and_the_numbers_of_the_solution_are_asked(suite):
    samples = suite.samples(n=30, seed=0)
    corrected = 0
    for sample in samples:
        *premises, question, reply = [message.content for message in sample.messages]
        assert question == "How many hats has she?"
        assert set(premises[1::2]) == {NOTED}
        told = premises[::2]
        corrected += told[-1].startswith("I was wrong there: ")
        asked = [reply[value.start : value.end] for value in sample.values]
        assert asked[-1] == asked[-2]
        assert reply.endswith(f"The answer is {asked[-1]}.")
        assert "<<" not in reply
        number = int(asked[0])
        assert any(f"{number} hats" in message for message in told)
    assert 0 < corrected < 30


def test_the_same_seed_tells_the_same_problems(suite):
    assert suite.samples(n=5, seed=3) == suite.samples(n=5, seed=3)
    assert suite.samples(n=5, seed=3) != suite.samples(n=5, seed=4)


def test_too_few_problems_and_no_data_are_refused(suite):
    with pytest.raises(DataError, match="30 of its rows"):
        suite.samples(n=31, seed=0)
    with pytest.raises(DataError, match="give --data"):
        SUITE.samples(n=1, seed=0)


def test_the_full_cache_is_the_ceiling_and_nothing_the_floor(suite):
    assert find("gsm8k-turns") is SUITE
    samples = suite.samples(n=3, seed=0)
    full, none = (suite.metrics(suite.ask(stranger(), plan, samples)) for plan in ("full", "none"))
    assert (full["kl"], full["top1"]) == (0.0, 1.0)
    assert none["kl"] > 0.01
