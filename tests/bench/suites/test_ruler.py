import json
import os
from pathlib import Path

import pytest
from strangers import stranger

from kvfold.bench.ask.asking import Answer
from kvfold.bench.choices import choose
from kvfold.bench.suites import find, ruler
from kvfold.data.ruler import QUESTIONS, TASKS
from kvfold.errors import DataError, SuiteError

REAL = Path(os.environ.get("KVFOLD_DATA", "/nowhere")) / "eval"
SUITE = choose(ruler.SUITE, given=["tokens=1200"])
COST = dict.fromkeys(
    ("stored", "resident", "attended", "stored_bytes", "resident_bytes", "full_bytes", "ttft_seconds", "tpot_seconds"),
    1.0,
)


def ready(task, number):
    return {
        "task": task,
        "prompt": f"Remember. The number of {task} {number} is {number}{number}. The sky is blue.\nWhich number?\n",
        "answer_prefix": "The number is ",
        "outputs": [f"{number}{number}", "blue"],
    }


@pytest.fixture
def prompts(tmp_path):
    """A file of ready prompts of two tasks, three of one and two of the other."""
    rows = [ready("vt", number) for number in range(3)] + [ready("qa_1", number) for number in range(2)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def parrot(monkeypatch):
    """Answers with prepared replies, and writes down what was asked."""

    def say(subject, plans, prompts):
        say.asked = list(prompts)
        for number, said in enumerate(say.replies):
            tokens = subject.tokenizer(f" {said}", add_special_tokens=False)["input_ids"]
            yield plans[0], {number: Answer(tokens=tokens, cost=COST)}

    monkeypatch.setattr(ruler, "ask_each", say)
    return say


def test_without_data_there_are_eleven_kinds_in_turn():
    samples = SUITE.samples(n=22, seed=0)
    kinds = [sample.kind for sample in samples]
    assert kinds[:11] == kinds[11:] == [task for task in TASKS if task not in QUESTIONS]
    assert SUITE.settings["tasks"] == kinds[:11]
    assert find("ruler") is ruler.SUITE


def test_texts_with_questions_give_all_thirteen(tmp_path):
    path = tmp_path / "tales.jsonl"
    story = "The king had a red hat. He wore it every day of the week. " + "Nobody else had one like it. " * 20
    path.write_text(json.dumps({"text": story, "qa": [{"question": "What had the king?", "answer": "a red hat"}]}))
    suite = choose(SUITE, data=path)
    assert suite.settings["tasks"] == list(TASKS)
    tasks = {s.kind: s.task(stranger().tokenizer) for s in suite.samples(n=13, seed=0)}
    assert tasks["qa_1"].outputs == ("a red hat",)
    assert "Nobody else had one like it." in tasks["niah_single_2"].prompt


def test_every_kind_is_asked_and_the_outputs_score(parrot):
    samples = SUITE.samples(n=11, seed=0)
    tasks = [sample.task(stranger().tokenizer) for sample in samples]
    parrot.replies = [", ".join(task.outputs) for task in tasks]
    outcomes = SUITE.ask(stranger(), "full", samples)
    assert [(o.family, o.score) for o in outcomes] == [(task.task, 1.0) for task in tasks]
    for one, task in zip(parrot.asked, tasks, strict=True):
        folded, asked = (stranger().tokenizer.decode(list(part)) for part in (one.context, one.question))
        assert folded.count(task.question) == (task.task == "cwe")  # its example asks the same
        assert asked.strip().startswith(task.question)
        assert asked.endswith(task.answer_prefix)
        assert len(one.context) + len(one.question) + one.reply_tokens <= 1200 + 8  # the template's own tokens


def test_ready_prompts_are_asked_as_they_are(prompts, parrot):
    suite = choose(ruler.SUITE, data=prompts)
    samples = suite.samples(n=5, seed=0)
    assert [sample.made.task for sample in samples] == ["vt", "qa_1", "vt", "qa_1", "vt"]
    assert len({sample.made.prompt for sample in samples}) == 5
    parrot.replies = ["blue"] * 5
    outcomes = suite.ask(stranger(), "full", samples)
    assert [(o.family, o.score) for o in outcomes] == [("vt", 0.5), ("qa_1", 1.0)] * 2 + [("vt", 0.5)]
    assert stranger().tokenizer.decode(list(parrot.asked[0].question)).endswith("<|assistant|> The number is")
    assert "tokens" not in suite.settings
    assert suite.settings["tasks"] == ["vt", "qa_1"]


def test_ready_prompts_come_in_an_order_of_the_seed_and_never_twice(prompts):
    suite = choose(ruler.SUITE, data=prompts, given=["tasks=vt"])
    orders = {tuple(one.made.prompt for one in suite.samples(n=3, seed=seed)) for seed in range(20)}
    assert len(orders) > 1
    assert all(len(set(order)) == 3 for order in orders)
    with pytest.raises(SuiteError, match=r"4 samples were asked for; prompts\.jsonl has 3"):
        suite.samples(n=4, seed=0)


def test_a_task_that_the_data_has_not_says_which_it_has(prompts):
    with pytest.raises(DataError, match="this data has vt, qa_1"):
        choose(ruler.SUITE, data=prompts, given=["tasks=cwe"]).samples(n=1, seed=0)
    with pytest.raises(DataError, match="for qa with texts and their questions"):
        choose(ruler.SUITE, given=["tasks=qa_2"]).samples(n=1, seed=0)
    with pytest.raises(SuiteError, match="RULER has niah_single_1"):
        choose(ruler.SUITE, given=["tasks=haystack"])


@pytest.mark.parametrize("change", [{"task": "haystack"}, {"outputs": []}])
def test_a_ready_prompt_of_the_wrong_shape_names_its_row(tmp_path, change):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(ready("vt", 1)) + "\n" + json.dumps(ready("vt", 2) | change))
    with pytest.raises(DataError, match="row 2"):
        choose(ruler.SUITE, data=path).samples(n=1, seed=0)


def test_a_whole_run_stays_within_its_size():
    outcomes = SUITE.ask(stranger(), "snapkv(keep=0.25)", SUITE.samples(n=3, seed=0))
    assert all(0.2 < outcome.stored <= 0.25 for outcome in outcomes)
    assert all(0.0 <= outcome.score <= 1.0 for outcome in outcomes)


@pytest.mark.skipif(not REAL.is_dir(), reason="KVFOLD_DATA names no folder with eval/")
@pytest.mark.parametrize("tokens", [4096, 8192])
def test_the_real_prompts_are_read_and_cut_at_their_question(tokens):
    suite = choose(ruler.SUITE, given=[f"tokens={tokens}"], data=REAL)
    samples = suite.samples(n=275, seed=0)
    assert len(suite.settings["tasks"]) == 11
    assert all(one.made.question.startswith(("What ", "Question: ")) for one in samples)
    assert all(one.made.score(" ".join(one.made.outputs)) == 1.0 for one in samples)
