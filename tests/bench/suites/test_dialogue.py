import dataclasses
import json
import os
from math import exp
from pathlib import Path

import pytest
import torch
from strangers import stranger

from kvfold.bench.ask.divergence import Comparison
from kvfold.bench.ask.read_turns import _metrics
from kvfold.bench.ask.transcript import transcript
from kvfold.bench.choices import choose
from kvfold.bench.suites import find
from kvfold.bench.suites.dialogue import SUITE, DialogueSuite
from kvfold.chat.rows import Rows
from kvfold.errors import DataError, SuiteError

REAL = Path(os.environ.get("KVFOLD_DATA", "/nowhere")) / "eval"
CITIES = ("Turin", "Lisbon", "San Jose", "Oslo")
METRICS = {"exact", "value_log_likelihood", "kl", "top1"}
PLANS = ["streaming_llm(keep=0.3)", "snapkv(keep=0.3) + int8", "h2o(keep=0.3)", "none"]


def errand(number, turns):
    """A dialogue in which a city of the first turn comes back in the last."""
    city = CITIES[number % len(CITIES)]
    said = [(f"I want to go to {city} soon.", "When would that be?", {})]
    said += [(f"Give me {'some ' * (1 + number % 3)}time.", f"Take {turn} minutes.", {}) for turn in range(2, turns)]
    said += [("So what will it be?", f"You go to {city} then, I see.", {"city": city})]
    messages = []
    for user, assistant, slots in said:
        messages += [{"role": "user", "content": user, "slots": {}}]
        messages += [{"role": "assistant", "content": assistant, "slots": slots}]
    return {"messages": messages}


@pytest.fixture(scope="module")
def errands(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "errands.jsonl"
    path.write_text("\n".join(json.dumps(errand(number, 4 + number % 3)) for number in range(8)))
    return path


@pytest.fixture
def suite(errands):
    return choose(SUITE, data=errands)


def test_the_suite_is_found_by_its_name():
    assert find("dialogue") is SUITE


def test_the_full_cache_is_the_ceiling_and_nothing_the_floor(suite):
    samples = suite.samples(n=4, seed=0)
    full, none = (suite.metrics(suite.ask(stranger(), plan, samples)) for plan in ("full", "none"))
    assert set(full) == METRICS
    assert (full["kl"], full["top1"]) == (0.0, 1.0)
    assert none["kl"] > 0.05
    assert none["top1"] < 1.0


@pytest.mark.parametrize("plan", PLANS)
def test_histories_of_different_length_are_metrics_together_as_alone(suite, plan):
    samples = suite.samples(n=3, seed=0)
    assert len({len(sample.messages) for sample in samples}) > 1
    for sample, together in zip(samples, suite.ask(stranger(), plan, samples), strict=True):
        alone = suite.ask(stranger(), plan, [sample])[0]
        assert together.metrics == pytest.approx(alone.metrics, abs=1e-4)
        assert together.score == alone.score


@pytest.mark.parametrize("plan", ["full", "snapkv(keep=0.3)"])
def test_the_likelihood_of_a_value_is_that_of_saying_it_after_the_folded_turns(suite, plan):
    sample = suite.samples(n=1, seed=0)[0]
    read = transcript(stranger().tokenizer, sample.messages)
    [value] = sample.values
    rows = Rows(stranger().model, plan, rows=1)
    for turn in read.turns[:-1]:
        rows.feed([read.tokens[turn.start : turn.stop]])
        rows.fold()
    span = read.stretch(value.message, value.start, value.end)
    at = read.turns[-1].start
    logs = []
    for token in span:
        expected = rows.logits([read.tokens[at:token]])[0].log_softmax(dim=-1)
        logs.append(float(expected[read.tokens[token]]))
        at = token
    outcome = suite.ask(stranger(), plan, [sample])[0]
    assert outcome.metrics["value_log_likelihood"] == pytest.approx(sum(logs) / len(logs), abs=1e-3)


def compared(tokens, **wrong):
    """As if a model had known every token after the first turn but these."""
    right = torch.ones(tokens, dtype=torch.bool)
    for place in wrong.get("at", ()):
        right[place] = False
    numbers = torch.arange(tokens, dtype=torch.float)
    return Comparison(divergence=numbers, agrees=right, likelihood=-numbers, full_likelihood=-numbers, right=right)


def test_the_score_may_be_the_likelihood(suite):
    likely = choose(suite, given=["score=likelihood"])
    for one in likely.ask(stranger(), "snapkv(keep=0.3)", likely.samples(n=2, seed=0)):
        assert one.score == pytest.approx(exp(one.metrics["value_log_likelihood"]))
        assert 0.0 < one.score < 1.0


def test_every_token_of_a_value_must_be_right_and_no_other(suite):
    sample = next(one for one in suite.samples(n=8, seed=0) if "San Jose" in one.messages[0].content)
    read = transcript(stranger().tokenizer, sample.messages)
    first, count = read.turns[0].stop, len(read.tokens) - read.turns[0].stop - 1
    [value] = sample.values
    said = sample.messages[value.message].content[value.start : value.end]
    places = [i for i in range(first, len(read.tokens)) if i in read.stretch(value.message, value.start, value.end)]
    assert stranger().tokenizer.decode([read.tokens[i] for i in places]).strip() == said == "San Jose"
    prediction = [i - first - 1 for i in places]  # token i is prediction by the one before it
    assert _metrics(sample, read, compared(count, at=set(range(count)) - set(prediction)))["exact"] == 1.0
    for place in prediction:
        assert _metrics(sample, read, compared(count, at=[place]))["exact"] == 0.0
    assert _metrics(sample, read, compared(count))["value_log_likelihood"] == -sum(prediction) / len(prediction)


def test_replies_after_the_first_turn_are_compared_and_no_words_of_the_user(suite):
    sample = suite.samples(n=1, seed=0)[0]
    read = transcript(stranger().tokenizer, sample.messages)
    first, count = read.turns[0].stop, len(read.tokens) - read.turns[0].stop - 1
    own = [i - first - 1 for reply in read.replies[1:] for i in reply]
    text = stranger().tokenizer.decode([read.tokens[i + first + 1] for i in own])
    assert "Take 2 minutes." in text
    assert "time" not in text
    assert "When would" not in text
    assert _metrics(sample, read, compared(count, at=set(range(count)) - set(own)))["top1"] == 1.0
    assert _metrics(sample, read, compared(count, at=own))["top1"] == 0.0


def test_dialogues_can_be_joined_and_cut(errands):
    joined = choose(SUITE, given=["joined=2"], data=errands).samples(n=3, seed=0)
    assert all(len(one.messages) > 12 and len(one.values) == 2 for one in joined)
    assert len(choose(SUITE, given=["joined=4", "turns=9"], data=errands).samples(n=1, seed=0)[0].messages) == 18
    one = choose(SUITE, given=["joined=2"], data=errands)
    assert one.ask(stranger(), "snapkv(keep=0.3)", one.samples(n=2, seed=0))


def test_sliding_layers_and_missing_templates_are_no_hindrance(suite):
    for subject in (stranger(slides=True), stranger(chats=False)):
        samples = suite.samples(n=3, seed=0)
        assert suite.metrics(suite.ask(subject, "full", samples))["kl"] == 0.0


def test_the_same_seed_gives_the_same_outcomes_apart_from_times(suite):
    outcomes = [
        [
            dataclasses.replace(one, ttft_seconds=0.0, tpot_seconds=0.0)
            for one in suite.ask(stranger(), "h2o(keep=0.3)", suite.samples(n=3, seed=0))
        ]
        for _ in range(2)
    ]
    assert outcomes[0] == outcomes[1]


def test_what_is_missing_or_out_of_range_is_said(suite):
    with pytest.raises(DataError, match="give --data with a file of task dialogues"):
        SUITE.samples(n=1, seed=0)
    with pytest.raises(SuiteError, match="distance=0 was given"):
        DialogueSuite(distance=0)
    with pytest.raises(DataError, match="8 of them hold a value"):
        suite.samples(n=9, seed=0)


@pytest.mark.skipif(not REAL.is_dir(), reason="KVFOLD_DATA names no folder with eval/")
def test_real_dialogues_can_be_read():
    suite = choose(SUITE, data=REAL)
    assert set(suite.metrics(suite.ask(stranger(), "snapkv(keep=0.3)", suite.samples(n=3, seed=0)))) == METRICS
