"""The suite speed on a tiny shape. What is held here are ratios, sums and words: no time is compared with a clock."""

import json
from dataclasses import replace

import called
import pytest
import torch

from kvfold.bench.speed import stages, static
from kvfold.bench.speed.models import feed, fill_stock
from kvfold.bench.speed.stages import StageTimer, observed, staged
from kvfold.bench.subject import open_subject
from kvfold.bench.suites import speed
from kvfold.bench.suites.speed import SUITE, Speed
from kvfold.errors import SuiteError
from kvfold.open import cache
from tape import Tape

SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
PLANS = (
    "full",
    "none",
    "h2o(keep=0.25)",
    "snapkv(keep=0.25)",
    "streaming_llm(keep=0.25) + int8",
    "sonic(keep=0.25, verbatim=0.5)",
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A shape of a config file that is nobody's."""
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(SHAPE))
    return open_subject(str(path))


@pytest.fixture(params=["decode", "prefill", "fold", "talk"])
def suite(request):
    """Every stage, at a length that costs nothing."""
    return Speed(tokens=128, stage=request.param)


@pytest.mark.parametrize("plan", PLANS)
def test_a_turn_is_a_ratio_to_full_and_to_the_stock_cache(subject, suite, plan):
    outcomes = suite.ask(subject, plan, suite.samples(n=3, seed=0))
    assert len(outcomes) == 3
    for one in outcomes:
        assert one.score == one.metrics["speedup_over_full"] == one.metrics["full_seconds"] / one.metrics["seconds"]
        assert one.metrics["speedup_over_stock"] == one.metrics["stock_seconds"] / one.metrics["seconds"]
        assert one.full_bytes == 128 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, size, float32


def test_a_rival_takes_turns_by_its_own_clock(subject, monkeypatch, tmp_path):
    suite = Speed(tokens=128)
    with called.rivals(monkeypatch, tmp_path / "asked.jsonl", one=subject) as rivals:
        met = replace(subject, rivals=rivals)
        outcomes = suite.ask(met, "far:Honest", suite.samples(n=3, seed=0))
        with pytest.raises(SuiteError, match="rivals are timed decoding only"):
            Speed(tokens=128, stage="talk").ask(met, "far:Honest", [0])
    assert [one.metrics["seconds"] for one in outcomes] == [0.25] * 3
    assert all(one.score == one.metrics["full_seconds"] / 0.25 for one in outcomes)
    assert called.asked(tmp_path / "asked.jsonl").count("steps") == 5  # two of them to warm up


def test_stages_are_named_and_a_plan_that_folds_spends_on_selection(subject):
    suite = Speed(tokens=128, stage="prefill")
    spent = {plan: suite.ask(subject, plan, [0])[0].metrics for plan in ("full", "snapkv(keep=0.25)")}
    for metrics in spent.values():
        assert metrics["attention_seconds"] > 0
        assert metrics["weights_seconds"] > 0
        assert metrics["copies_seconds"] > 0
    assert spent["full"]["selection_seconds"] == 0.0
    assert spent["snapkv(keep=0.25)"]["selection_seconds"] > 0.0


def test_a_fold_is_timed_apart_from_what_it_folds(subject):
    suite = Speed(tokens=128, stage="fold")
    for plan in ("snapkv(keep=0.25)", "sonic(keep=0.25, verbatim=0.5)", "int8"):
        outcome = suite.ask(subject, plan, [0])[0]
        assert 0 < outcome.metrics["fold_over_prefill"] < outcome.metrics["seconds"] / outcome.metrics["full_seconds"]
        assert outcome.stored_bytes < outcome.full_bytes


def test_timing_stages_leaves_no_trace_even_after_an_error(subject):
    past = cache(subject.model, "snapkv(keep=0.25)", least=0)

    def fails():
        assert all(layer.timer is not None for layer in past.memory.layers.values())
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        staged(past, fails, synchronise=lambda: None)
    assert all(layer.timer is None for layer in past.memory.layers.values())


@pytest.mark.parametrize("plan", ["snapkv(keep=0.25)", "sonic(keep=0.25, verbatim=0.5)"])
def test_stages_of_one_cache_are_measured_and_no_other(subject, plan):
    """A fold that is asked for between forwards is selection; another cache's work is not in the sums."""
    measured, other = (cache(subject.model, plan, prompt_tokens=0) for _ in range(2))
    feed(measured, subject.model, 64)
    timer = StageTimer(lambda: None)
    with observed(measured, timer):
        feed(other, subject.model, 64)
        other.fold()
        assert set(timer.seconds.values()) == {0.0}
        measured.fold()
    assert timer.seconds["fold"] > 0.0
    assert timer.seconds["attend"] == timer.seconds["append"] == 0.0


def test_the_seconds_of_an_inner_stage_are_not_counted_twice(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 8.0])  # attend begins, fold begins and ends, attend ends
    monkeypatch.setattr(stages, "perf_counter", lambda: next(moments))
    timer = StageTimer(lambda: None)
    with timer("attend"), timer("fold"):
        pass
    assert timer.seconds == {"attend": 6.0, "fold": 2.0, "append": 0.0}


def test_fewer_bytes_are_moved_where_fewer_are_held(subject):
    suite = Speed(tokens=128)
    whole, part = (suite.ask(subject, plan, [0])[0] for plan in ("full", "streaming_llm(keep=0.25)"))
    saved = whole.metrics["moved_bytes"] - part.metrics["moved_bytes"]
    assert saved == whole.stored_bytes - part.stored_bytes > 0
    assert part.metrics["predicted_seconds"] < whole.metrics["predicted_seconds"]


def test_the_floor_is_foretold_in_bytes_over_bandwidth(subject, suite):
    said = suite.prediction(subject, "streaming_llm(keep=0.25)")
    assert said.startswith("a turn takes at least ")
    assert "GB/s" in said


@pytest.mark.parametrize("plan", ["full", "snapkv(keep=0.25)"])
def test_captured_steps_take_turns_with_a_static_cache_that_is_captured_too(subject, plan):
    made = speed._CapturedDecode(subject, plan, 128, seed=0, graph=Tape)
    with torch.no_grad():
        turns = [made.turn(number) for number in range(3)]
    assert [one.captures for one in made.steps] == [1, 1]
    assert made.plan.memory.fed == made.full.memory.fed == 131
    assert made.stock.get_seq_length() == int(made.static._cache.get_seq_length()) == 131
    metrics = speed._metrics(turns[-1])
    assert metrics["speedup_over_static"] == metrics["static_seconds"] / metrics["seconds"]


def test_a_static_step_says_what_a_static_cache_says_and_begins_again_when_it_is_full(subject, monkeypatch):
    monkeypatch.setattr(static, "_ROOM", 2)
    subject.model.set_attn_implementation("sdpa")
    step = static.StaticStep(subject.model, 64, seed=0, capture=Tape)
    usual = fill_stock(subject.model, 64, seed=0)
    for number in (5, 6):
        with torch.no_grad():
            step.step(number)
            wanted = subject.model(torch.tensor([[number]]), past_key_values=usual).logits
        assert torch.allclose(step._graph.outputs, wanted, atol=1e-4)
    with torch.no_grad():
        step.step(7)
    assert int(step._cache.get_seq_length()) == 65


def test_captured_steps_are_refused_where_there_are_none(subject):
    suite = Speed(tokens=64, captured=True)
    for asked in (suite.prediction, lambda *given: suite.ask(*given, [0])):
        with pytest.raises(SuiteError, match="captured=true was asked for on cpu, which has no graphs"):
            asked(subject, "full")
    with pytest.raises(SuiteError, match="captured=true was asked for with stage=talk"):
        Speed(stage="talk", captured=True).samples(n=1, seed=0)


def test_an_unknown_stage_names_the_real_ones():
    with pytest.raises(SuiteError, match="decode, prefill, fold, talk"):
        Speed(stage="sleep").samples(n=1, seed=0)


def test_medians_are_what_records_hold(subject):
    outcomes = Speed(tokens=64).ask(subject, "full", range(5))
    found = SUITE.metrics(outcomes)
    assert found["seconds"] == sorted(one.metrics["seconds"] for one in outcomes)[2]


def test_a_context_of_nothing_is_refused_and_one_of_a_token_is_measured(subject):
    with pytest.raises(SuiteError, match="give 1 or more"):
        Speed(tokens=0).samples(n=1, seed=0)
    for stage in ("decode", "prefill"):
        assert Speed(tokens=1, stage=stage).ask(subject, "snapkv(keep=0.5)", [0])[0].score > 0
