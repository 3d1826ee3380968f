import json

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvfold.bench.choices import choose
from kvfold.bench.harness.tasks import load
from kvfold.bench.suites import find
from kvfold.errors import DataError, SuiteError


def suite(*given):
    return choose(find("lm-eval"), given=list(given))


def of(tasks, *kinds):
    return "tasks=" + ",".join(str(tasks[kind]) for kind in kinds)


def test_full_scores_a_task_as_lm_eval_itself_does(subject, tasks):
    chosen = suite(of(tasks, "choice"))
    outcomes = chosen.ask(subject, "full", chosen.samples(n=12, seed=0))
    stock = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, backend="causal", batch_size=4)
    manager = TaskManager(include_defaults=False)
    wanted = simple_evaluate(stock, tasks=[str(tasks["choice"])], task_manager=manager, bootstrap_iters=0)
    wanted = wanted["results"]["own_choice"]
    found = [outcome.score for outcome in outcomes]
    assert 0.0 < sum(found) < 12.0, "a task on which nothing is right or nothing wrong would show nothing"
    assert sum(found) / 12 == pytest.approx(wanted["acc,none"])
    assert sum(outcome.metrics["acc_norm"] for outcome in outcomes) / 12 == pytest.approx(wanted["acc_norm,none"])


def test_samples_take_the_tasks_in_turn_and_follow_from_the_seed(tasks):
    chosen = suite(of(tasks, "choice", "answer"))
    samples = chosen.samples(n=24, seed=0)
    assert [sample.task for sample in samples[:4]] == ["own_choice", "own_answer"] * 2
    assert len(set(samples)) == 24
    assert samples == chosen.samples(n=24, seed=0)
    assert samples != chosen.samples(n=24, seed=1)


def test_a_documents_outcome_does_not_depend_on_what_is_asked_with_it(subject, tasks):
    chosen = suite(of(tasks, "choice", "answer"))
    samples = chosen.samples(n=4, seed=0)
    together = chosen.ask(subject, "snapkv(keep=0.5)", samples)
    alone = [chosen.ask(subject, "snapkv(keep=0.5)", [sample])[0] for sample in samples]
    assert [one.score for one in together] == [one.score for one in alone]
    assert [one.family for one in together] == [sample.task for sample in samples]


def test_outcomes_say_what_the_cache_held(subject, tasks):
    chosen = suite(of(tasks, "choice"))
    samples = chosen.samples(n=4, seed=0)
    full, half = (chosen.ask(subject, plan, samples)[0] for plan in ("full", "streaming_llm(keep=0.5)"))
    assert 1.0 <= full.stored < 1.2  # the raw tail has room for tokens to come, and that room counts
    assert 0.3 < half.stored < 0.7
    assert half.full_bytes == full.full_bytes


def test_settings_name_files_by_their_digest_and_never_by_their_place(tasks):
    settings = suite(of(tasks, "choice")).settings
    assert settings["tasks"][0].startswith("choice.yaml ")
    assert settings["files"][0].startswith("stories.jsonl ")
    assert str(tasks["data"].parent) not in json.dumps(settings)


def test_examples_in_the_prompt_can_be_chosen(tasks):
    task = next(iter(load((str(tasks["choice"]),), 0).values()))
    assert task.get_config("num_fewshot") == 0
    assert suite(of(tasks, "choice"), "shots=2").settings["shots"] == 2


def test_prompts_can_go_through_the_chat_template(subject, tasks, monkeypatch):
    from kvfold.bench.harness.scoring import Scorer

    seen = []
    real = Scorer.likelihoods
    monkeypatch.setattr(Scorer, "likelihoods", lambda self, passages: (seen.extend(passages), real(self, passages))[1])
    chosen = suite(of(tasks, "choice"), "chat=true")
    chosen.ask(subject, "full", chosen.samples(n=1, seed=0))
    text = subject.tokenizer.decode(list(seen[0].context))
    assert text.startswith("<|bos|><|user|>")
    assert text.endswith("<|assistant|>")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((), SuiteError, "no task was named; give --set tasks="),
        (("tasks=/nowhere/task.yaml",), SuiteError, "there is no such file"),
        pytest.param(("tasks=no_such_task_at_all",), SuiteError, "lm_eval cannot read them", marks=pytest.mark.slow),
    ],
)
def test_no_task_and_unknown_tasks_are_one_clear_line(given, error, words):
    with pytest.raises(error, match=words) as caught:
        suite(*given).samples(n=1, seed=0)
    assert "\n" not in str(caught.value)


def test_a_task_whose_data_are_not_there_is_one_clear_line(tmp_path, tasks):
    text = tasks["choice"].read_text().replace(str(tasks["data"]), str(tmp_path / "gone.jsonl"))
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(DataError, match=r"data cannot be had.*gone\.jsonl") as caught:
        suite(f"tasks={tmp_path / 'task.yaml'}").samples(n=1, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [("metric=f1",), ("metric=word_perplexity",), ()])
def test_a_metric_that_cannot_be_a_score_is_refused_with_those_that_can(subject, tasks, given):
    chosen = suite(of(tasks, "rolling" if not given or "word" in given[0] else "choice"), *given)
    with pytest.raises(SuiteError, match="a score is a metric that is better when higher"):
        chosen.ask(subject, "full", chosen.samples(n=1, seed=0))


def test_more_documents_than_there_are_and_tasks_that_sample_are_refused(subject, tasks):
    with pytest.raises(SuiteError, match="these tasks have 12"):
        suite(of(tasks, "choice")).samples(n=13, seed=0)
    chosen = suite(of(tasks, "sampled"))
    with pytest.raises(SuiteError, match="do_sample"):
        chosen.ask(subject, "full", chosen.samples(n=1, seed=0))
