import subprocess
import sys

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from kvfold.bench.harness.model import FoldedLM
from kvfold.errors import KvfoldError, PlanError, SuiteError

STORIES = ["Once upon a time a red house stood in Turin.", "Blue.", "", "Anna and Ben went home. " * 20]
ENDS = [" It was red", " blue", " and then they all went home again", " x"]


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def stock(subject):
    return HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, backend="causal", batch_size=4)


def folded(subject, plan="full", **settings):
    return FoldedLM(subject, plan, batch_size=4, **settings)


def same(found, wanted):
    """Sums of log-probabilities are equal up to float32, and the greedy flags are the same."""
    scores = [value for value, _ in wanted]
    return [value for value, _ in found] == pytest.approx(scores, rel=2e-4, abs=2e-4) and [g for _, g in found] == [
        g for _, g in wanted
    ]


def test_lm_eval_knows_the_class_by_its_name():
    assert get_model("kvfold") is FoldedLM


@pytest.mark.parametrize("stride", [2, 64])
def test_full_scores_continuations_as_lm_evals_own_class_does(subject, stock, stride):
    asked = [(story, end) for story in STORIES for end in ENDS]
    wanted = stock.loglikelihood(instances("loglikelihood", asked))
    assert same(folded(subject, stride=stride).loglikelihood(instances("loglikelihood", asked)), wanted)


def test_full_scores_whole_texts_as_lm_evals_own_class_does_in_several_windows(subject, stock):
    asked = [(STORIES[0],), (STORIES[3] * 4,)]
    assert len(stock.tok_encode(asked[1][0])) > 256, "or there is one window only"
    wanted = stock.loglikelihood_rolling(instances("loglikelihood_rolling", asked))
    found = folded(subject).loglikelihood_rolling(instances("loglikelihood_rolling", asked))
    assert found == pytest.approx(wanted, rel=2e-4)


def test_a_context_that_is_too_long_is_cut_as_lm_evals_own_class_does(subject, stock):
    asked = [(STORIES[3] * 6, ENDS[2])]
    wanted = stock.loglikelihood(instances("loglikelihood", asked))
    assert same(folded(subject).loglikelihood(instances("loglikelihood", asked)), wanted)


@pytest.mark.parametrize("until", [[], ["a"], ["\n\n", "er", "."]])
def test_full_generates_what_lm_evals_own_class_does(subject, stock, until):
    settings = {"until": until, "max_gen_toks": 40, "do_sample": False}
    asked = [(story, dict(settings)) for story in STORIES if story]
    wanted = stock.generate_until(instances("generate_until", asked))
    found = folded(subject).generate_until(instances("generate_until", asked))
    assert found == wanted
    assert any(found)


def test_a_plan_changes_what_is_scored_and_generated(subject):
    asked = instances("loglikelihood", [(STORIES[3], end) for end in ENDS])
    spoken = instances("generate_until", [(STORIES[3], {"until": [], "max_gen_toks": 20})])
    rolled = instances("loglikelihood_rolling", [(STORIES[3],)])
    full, less = folded(subject), folded(subject, "streaming_llm(tokens=8)")
    assert [v for v, _ in full.loglikelihood(asked)] != pytest.approx(
        [v for v, _ in less.loglikelihood(asked)], rel=1e-3
    )
    assert full.generate_until(spoken) != less.generate_until(spoken)
    assert full.loglikelihood_rolling(rolled) != pytest.approx(less.loglikelihood_rolling(rolled), rel=1e-3)
    assert less.scorer.costs.mean()["stored"] < 0.5


def test_requests_come_back_in_their_order_whatever_their_settings(subject):
    asked = [(story, {"until": ["e"], "max_gen_toks": 5 + i % 2}) for i, story in enumerate(STORIES * 2) if story]
    alone = [folded(subject).generate_until(instances("generate_until", [one]))[0] for one in asked]
    assert folded(subject).generate_until(instances("generate_until", asked)) == alone


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("plan=snapkv(keep=0.5;window=8)", "snapkv(keep=0.5, window=8)"),
        ("plan=none", "none"),
        ("plan=streaming_llm(keep=0.25)+int8", "streaming_llm(keep=0.25) + int8"),
        ("batch_size=2", "full"),
    ],
)
def test_a_plan_may_come_as_text_among_arguments_that_are_cut_at_commas(text, plan, subject, monkeypatch):
    from kvfold.bench.harness import model

    monkeypatch.setattr(model, "open_subject", lambda name, **settings: subject)
    assert FoldedLM.create_from_arg_string(f"pretrained=tiny,{text}", {"device": None}).plan == plan
    name, _, value = text.partition("=")
    assert FoldedLM.create_from_arg_obj({"pretrained": "tiny", name: None if value == "none" else value}).plan == plan


def test_what_the_class_does_not_know_or_do_is_refused(subject):
    with pytest.raises(SuiteError, match="peft were given; kvfold's class knows pretrained"):
        FoldedLM(subject, peft="x")
    with pytest.raises(PlanError, match="near it are snapkv"):
        FoldedLM(subject, "snapkw(keep=0.5)")
    with pytest.raises(SuiteError, match="a model is named"):
        FoldedLM(subject.model)
    for settings in ({"do_sample": True, "temperature": 0.7}, {"num_beams": 4}):
        asked = instances("generate_until", [("Hi", {"until": [], "max_gen_toks": 5, **settings})])
        with pytest.raises(SuiteError, match="answers greedily"):
            folded(subject).generate_until(asked)
    with pytest.raises(SuiteError, match="give a smaller max_gen_toks"):
        folded(subject).generate_until(instances("generate_until", [("Hi", {"until": [], "max_gen_toks": 256})]))
    with pytest.raises(KvfoldError, match="shorter answers"):
        folded(subject).loglikelihood(instances("loglikelihood", [("Hi", " no" * 300)]))


@pytest.mark.slow
def test_lm_evals_own_command_runs_with_our_class(subject, tasks, tmp_path):
    subject.model.save_pretrained(tmp_path / "model")
    subject.tokenizer.save_pretrained(tmp_path / "model")
    words = [sys.executable, "-m", "kvfold.bench.harness", "run", "--model", "kvfold", "--tasks", str(tasks["choice"])]
    arguments = ["--model_args", f"pretrained={tmp_path / 'model'},plan=snapkv(keep=0.5,window=8)"]
    done = subprocess.run([*words, *arguments, "--batch_size", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "own_choice" in done.stdout
    assert "acc_norm" in done.stdout
    wrong = subprocess.run([*words, "--model_args", "plan=snapkw"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("kvfold: a plan names 'snapkw'")
