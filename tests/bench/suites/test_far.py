"""The suite far on a tiny shape. What is held here are ratios, sums and words: no time is compared with a clock."""

import json

import pytest

from kvfold.bench.subject import open_subject
from kvfold.bench.suites.far import FarSuite

SHAPE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLAN = "sentkv(budget=0.25, window=0, length=16)"


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(SHAPE))
    return open_subject(str(path))


def test_decoding_is_a_ratio_of_attention_to_the_full_cache(subject):
    outcomes = FarSuite(tokens=256).ask(subject, PLAN, range(3))
    metrics = outcomes[0].metrics
    assert all(outcome.metrics == metrics for outcome in outcomes)
    ratio = metrics["full_attention_seconds"] / metrics["attention_seconds"]
    assert metrics["attention_speedup"] == pytest.approx(ratio)
    scores = [outcome.score for outcome in outcomes]  # of each turn by itself
    assert len(set(scores)) == 3
    assert min(scores) <= ratio <= max(scores)
    assert 0 < metrics["attention_seconds"] < metrics["step_seconds"]
    assert metrics["wanted"] >= metrics["reused"] >= metrics["reused_evenly"] >= 0


def test_without_the_full_cache_in_turn_a_plan_is_compared_with_itself(subject):
    (outcome,) = FarSuite(tokens=256, beside=False).ask(subject, PLAN, range(1))
    assert outcome.score == 1.0


def test_a_prompt_scores_the_share_of_its_time_that_is_not_spent_on_moving(subject):
    (outcome,) = FarSuite(tokens=256, stage="prefill", piece=64).ask(subject, PLAN, range(1))
    assert outcome.family == "prefill at 256"
    assert outcome.score == 1 - outcome.metrics["index_and_move_share"]
    assert 0 < outcome.score < 1
    assert outcome.ttft_seconds == outcome.metrics["prefill_seconds"]


@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_a_cache_without_far_slots_counts_no_fetches(subject, stage):
    (outcome,) = FarSuite(tokens=128, stage=stage, piece=64).ask(subject, "streaming_llm(keep=0.5)", range(1))
    assert "wanted" not in outcome.metrics
    assert outcome.stored < 0.6
