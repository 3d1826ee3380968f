import json
import os
from pathlib import Path

import pytest
from stub_judge import refuse, stub_judge

from kvfold.bench.choices import choose
from kvfold.bench.judging import replies as replying
from kvfold.bench.judging.dialogues import TASKS
from kvfold.bench.judging.suite import agreement
from kvfold.bench.report.live import PlainLines
from kvfold.bench.run.executor import InProcess
from kvfold.bench.run.job import Job
from kvfold.bench.run.runner import run
from kvfold.bench.run.setting import Setting
from kvfold.bench.subject import Subject
from kvfold.bench.suites import find
from kvfold.errors import DataError, KvfoldError, SuiteError
from kvfold.hf.load import SHIPPED, new_llama

REAL = Path(os.environ.get("KVFOLD_DATA", "/nowhere")) / "eval"
HALF = Job(plan="streaming_llm(keep=0.5)", keep=0.5)


@pytest.fixture(scope="module")
def subject():
    """A model that knows nothing, with the shipped tokenizer."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = new_llama(
        **sizes, intermediate_size=64, vocab_size=2048, max_position_embeddings=2048, initializer_range=0.3
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(SHIPPED / "tiny"))
    return Subject(name="random", model=model, tokenizer=tokenizer, fingerprint="0", dtype="float32", device="cpu")


def replies(subject, plan, dialogues, *, reply_tokens):
    """The replies under one plan, which shares its reading with none."""
    found = {}
    for _, some in replying.replies_each(subject, [plan], dialogues, reply_tokens=reply_tokens):
        found |= some
    return [found[number] for number in range(len(dialogues))]


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with stub_judge() as serving:
        yield serving


def dialogue(task, number, turns=3):
    history = [
        {"user": f"Question {i} of {task} {number}?", "bot": f"Golden {task} {number} {i}."} for i in range(turns)
    ]
    return {"task": task, "id": number, "history": history}


def question(number, category="math"):
    row = {"question_id": number, "category": category, "turns": [f"What is {number}?", "And doubled?"]}
    return row | ({"reference": [f"It is {number}.", f"It is {2 * number}."]} if category == "math" else {})


@pytest.fixture
def data(tmp_path):
    """A folder with a small file of each kind."""
    rows = {
        "mtbench101": [dialogue(task, number, turns=2 + number) for number in range(2) for task in TASKS],
        "mtbench": [question(number, category) for number in range(3) for category in ("math", "writing")],
    }
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return tmp_path


def suite(name, data, *given, folder=None):
    chosen = choose(find(name), given=["reply_tokens=4", *given], data=data / f"{name}.jsonl")
    return chosen if folder is None else chosen.bound_to(folder)


def judged(name, data, judge, *given, folder=None):
    return suite(
        name, data, f"judge_url={judge.url}", "judge_model=wise", "judge_pause=0", "judge_at_a_time=1", *given,
        folder=folder,
    )  # fmt: skip


def go(chosen, subject, folder, *, n=4, jobs=(HALF,)):
    import io

    from rich.console import Console

    setting = Setting(suite=chosen, subject=subject, n=n, seed=0, threads=1)
    return run(setting, jobs, folder=folder, executor=InProcess(), watcher=PlainLines(Console(file=io.StringIO())))


@pytest.fixture
def log(subject, monkeypatch):
    """What is fed, folded and asked, with tokens as text."""
    from kvfold.bench.ask.audit import AuditedRows

    def texts(chunks):
        return [subject.tokenizer.decode(list(chunk)) for chunk in chunks]

    done = []
    real = {name: getattr(AuditedRows, name) for name in ("feed", "fold", "answer")}

    def feed(self, chunks):
        done.append(("feed", *texts(chunks)))
        real["feed"](self, chunks)

    def fold(self):
        done.append(("fold",))
        real["fold"](self)

    def answer(self, prompts, **settings):
        said = real["answer"](self, prompts, **settings)
        done.append(("ask", *texts(prompts), *texts(said)))
        return said

    for each in (feed, fold, answer):
        monkeypatch.setattr(AuditedRows, each.__name__, each)
    return done


def test_golden_replies_stand_in_the_history_of_mtbench101_and_each_turn_is_folded(subject, data, log):
    chosen = suite("mtbench101", data)
    dialogue = next(dialogue for dialogue in chosen.samples(n=26, seed=0) if dialogue.name == "TS 1")
    replies(subject, "full", [dialogue], reply_tokens=4)
    said = {i: entry[2] for i, entry in enumerate(log) if entry[0] == "ask"}
    q = [f"<|user|> Question {i} of TS 1?<|end|>" for i in range(3)]
    assert log == [
        ("ask", f"<|bos|>{q[0]}<|assistant|>", said[0]),
        ("feed", f"<|bos|>{q[0]}<|assistant|> Golden TS 1 0.<|end|>"),
        ("fold",),
        ("ask", f"{q[1]}<|assistant|>", said[3]),
        ("feed", f"{q[1]}<|assistant|> Golden TS 1 1.<|end|>"),
        ("fold",),
        ("ask", f"{q[2]}<|assistant|>", said[6]),
    ]


def test_the_models_own_reply_stands_in_the_history_of_mtbench(subject, data, log):
    chosen = suite("mtbench", data)
    dialogue = chosen.samples(n=1, seed=0)[0]
    found = replies(subject, "full", [dialogue], reply_tokens=4)[0]
    assert [entry[0] for entry in log] == ["ask", "feed", "fold", "ask"]
    assert log[1][1].endswith(f"<|assistant|> {found.texts[0]}<|end|>".replace("  ", " "))
    assert log[3][1] == "<|user|> And doubled?<|end|><|assistant|>"
    assert len(found.texts) == 2


def test_the_first_turn_of_six_tasks_only_sets_the_scene(data):
    dialogues = suite("mtbench101", data).samples(n=26, seed=0)
    scene = {dialogue.task for dialogue in dialogues if not dialogue.turns[0].counts}
    assert scene == {"CM", "AR", "CR", "FR", "SC", "SA"}
    assert all(turn.counts for dialogue in dialogues for turn in dialogue.turns[1:])


def test_rows_are_answered_as_they_would_be_alone(subject, data):
    dialogues = suite("mtbench101", data).samples(n=26, seed=0)
    dialogues = [dialogue for dialogue in dialogues if dialogue.task in ("TS", "CM", "IC")]
    together = replies(subject, HALF.plan, dialogues, reply_tokens=4)
    alone = [replies(subject, HALF.plan, [dialogue], reply_tokens=4)[0] for dialogue in dialogues]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_plans_share_the_first_turn_and_reply_as_they_would_alone(subject, data, log):
    dialogues = suite("mtbench", data).samples(n=2, seed=0)
    plans = ["full", HALF.plan, "snapkv(keep=0.5)"]
    found = {plan: {} for plan in plans}
    for plan, some in replying.replies_each(subject, plans, dialogues, reply_tokens=4):
        found[plan] |= some
    first = [entry for entry in log if entry[0] == "ask" and "And doubled?" not in entry[1]]
    assert len(first) == len(replying._groups(subject, dialogues)), "the first question was asked more than once"
    for plan in plans:
        alone = replies(subject, plan, dialogues, reply_tokens=4)
        for number, one in enumerate(alone):
            assert found[plan][number].tokens == one.tokens
            assert found[plan][number].cost["stored_bytes"] == one.cost["stored_bytes"]
            assert found[plan][number].cost["shared_prefill"]
            assert not one.cost["shared_prefill"]


def test_samples_take_the_families_in_turn_and_follow_from_the_seed(data):
    chosen = suite("mtbench101", data)
    dialogues = chosen.samples(n=13, seed=0)
    assert {dialogue.task for dialogue in dialogues} == set(TASKS)
    assert dialogues == chosen.samples(n=13, seed=0)
    assert [dialogue.name for dialogue in dialogues] != [dialogue.name for dialogue in chosen.samples(n=13, seed=1)]


def test_the_judge_sees_golden_history_own_reply_and_reference_where_the_task_has_one(subject, data, judge):
    chosen = judged("mtbench101", data, judge)
    dialogue = next(dialogue for dialogue in chosen.samples(n=26, seed=0) if dialogue.name == "MR 1")
    chosen.ask(subject, "full", [dialogue])
    reply = replies(subject, "full", [dialogue], reply_tokens=4)[0].texts[-1]
    shown = judge.asked[-1]["messages"][1]["content"]
    assert len(judge.asked) == 3
    assert "Golden MR 1 0." in shown
    assert reply in shown
    assert shown.endswith("for you alone>>\nGolden MR 1 2.")


def test_a_dialogue_is_worth_its_worst_turn_in_mtbench101_and_its_mean_turn_in_mtbench(subject, data, judge):
    judge.answers = ["[[9]]", "[[4]]", "[[8]]"]
    chosen = judged("mtbench101", data, judge)
    dialogue = next(dialogue for dialogue in chosen.samples(n=26, seed=0) if dialogue.name == "TS 1")
    [outcome] = chosen.ask(subject, "full", [dialogue])
    assert (outcome.score, outcome.metrics["turn_average"], outcome.family) == (4.0, 7.0, "TS")
    judge.answers = ["[[9]]", "[[4]]"]
    [outcome] = (chosen := judged("mtbench", data, judge)).ask(subject, "full", chosen.samples(n=1, seed=0))
    assert (outcome.score, outcome.metrics) == (6.5, {"first_turn": 9.0, "second_turn": 4.0})


def test_records_hold_scores_by_task_and_by_ability_and_the_judge_by_name(subject, data, judge, tmp_path):
    judge.answers = [f"[[{1 + i % 10}]]" for i in range(200)]
    chosen = judged("mtbench101", data, judge, folder=tmp_path / "out")
    record = go(chosen, subject, tmp_path / "out", n=13, jobs=())[0]
    values = json.loads(record.line())
    tasks = values["by_family"]
    assert set(tasks) == set(TASKS)
    assert values["perceptivity"] == pytest.approx(sum(tasks[t] for t in ("CM", "AR", "SI", "TS", "CC")) / 5)
    assert values["memory"] == tasks["CM"]
    assert values["task_average"] == pytest.approx(sum(tasks.values()) / 13)
    assert values["settings"]["scored_by"] == "wise, rubric 1"
    assert judge.url not in record.line()
    assert str(tmp_path) not in record.line()


def test_without_a_judge_the_score_is_agreement_with_the_full_cache_and_records_say_so(subject, data, tmp_path):
    chosen = suite("mtbench101", data, folder=tmp_path / "out")
    full, none, half = go(chosen, subject, tmp_path / "out", n=13)
    assert full.score == 1.0
    assert none.score < 1.0
    assert 0.0 <= half.score <= 1.0
    assert full.settings["scored_by"] == "agreement with the full cache's replies"
    own = {json.loads(line)["plan"] for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()}
    assert own == {"full", "none", HALF.plan}


@pytest.mark.parametrize(
    ("reply", "full", "share"),
    [([1, 2, 3], [1, 2, 3], 1.0), ([1, 2], [1, 2, 3, 4], 0.5), ([9, 2], [1, 2], 0.0), ([], [], 1.0), ([], [1], 0.0)],
)
def test_agreement_is_the_share_before_the_first_difference(reply, full, share):
    assert agreement(reply, full) == share


def test_agreement_without_a_folder_asks_the_full_cache_itself(subject, data):
    chosen = suite("mtbench", data)
    samples = chosen.samples(n=4, seed=0)
    assert [one.score for one in chosen.ask(subject, "full", samples)] == [1.0] * 4
    assert min(one.score for one in chosen.ask(subject, "none", samples)) < 1.0


def test_a_judge_that_gives_up_loses_nothing_and_the_same_command_goes_on(subject, data, judge, tmp_path):
    chosen = judged("mtbench", data, judge, "judge_tries=2", folder=tmp_path / "out")
    judge.answers = ["[[6]]"] * 5 + [refuse(503, "busy")]
    with pytest.raises(SuiteError, match="was asked 2 times"):
        go(chosen, subject, tmp_path / "out")
    made = len((tmp_path / "out" / "judgements.jsonl").read_text().splitlines())
    assert made == 5
    judge.answers = ["[[6]]"]
    judge.asked.clear()
    records = go(chosen, subject, tmp_path / "out", jobs=())
    assert [record.score for record in records] == [6.0, 6.0]
    plans = [json.loads(line)["plan"] for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    assert plans == ["full"] * 4 + ["none"] * 4
    assert len(judge.asked) <= 2 * 2 * 4 - made


def test_the_same_replies_under_two_plans_are_judged_once(subject, data, judge, tmp_path):
    chosen = judged("mtbench", data, judge, folder=tmp_path)
    samples = chosen.samples(n=2, seed=0)
    chosen.ask(subject, "full", samples)
    asked = len(judge.asked)
    chosen.ask(subject, "streaming_llm(tokens=1000)", samples)
    assert len(judge.asked) == asked == 4


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("mtbench101", {"task": "XX", "id": 1, "history": []}, "row 1.*XX"),
        ("mtbench101", {"task": "TS", "id": 1, "history": [{"user": "hi"}]}, "row 1.*bot"),
        ("mtbench101", {"task": "CM", "id": 1, "history": [{"user": "hi", "bot": "ho"}]}, "no turn to judge"),
        ("mtbench101", {"task": "TS", "history": []}, "no id"),
        ("mtbench", {"question_id": 1, "category": "c", "turns": ["one"]}, "two texts"),
        ("mtbench", {"question_id": 1, "category": "c", "turns": ["a", "b"], "reference": ["a", 1]}, "two texts"),
    ],
)
def test_a_row_of_another_shape_is_one_clear_line(tmp_path, name, row, words):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words):
        suite(name, tmp_path).samples(n=1, seed=0)


def test_missing_data_too_many_samples_and_half_a_judge_are_refused(data):
    with pytest.raises(DataError, match=r"give --data with the folder that holds mtbench\.jsonl\.xz"):
        find("mtbench").samples(n=1, seed=0)
    with pytest.raises(SuiteError, match=r"7 dialogues were asked for; mtbench\.jsonl holds 6"):
        suite("mtbench", data).samples(n=7, seed=0)
    with pytest.raises(SuiteError, match="holds 0 of at most 1 words"):
        suite("mtbench", data, "words=1").samples(n=1, seed=0)
    with pytest.raises(SuiteError, match="needs both an address and a name"):
        suite("mtbench", data, "judge_url=http://localhost")
    with pytest.raises(SuiteError, match="no web address"):
        suite("mtbench", data, "judge_url=localhost", "judge_model=m")
    with pytest.raises(SuiteError, match="give 1 or more"):
        suite("mtbench", data, "reply_tokens=0")


def test_a_dialogue_beyond_the_models_positions_is_refused_before_it_is_fed(subject, data):
    long = {"task": "TS", "id": 1, "history": [{"user": "Hi?", "bot": "No. " * 2000}, {"user": "Why?", "bot": "So."}]}
    (data / "mtbench101.jsonl").write_text(json.dumps(long) + "\n")
    chosen = suite("mtbench101", data)
    with pytest.raises(KvfoldError, match="the model has 2048 positions"):
        chosen.ask(subject, "full", chosen.samples(n=1, seed=0))


@pytest.mark.skipif(not REAL.is_dir(), reason="KVFOLD_DATA names no folder with eval/")
@pytest.mark.parametrize(("name", "rows", "families"), [("mtbench101", 1388, 13), ("mtbench", 80, 8)])
def test_the_published_files_are_read_whole(name, rows, families):
    dialogues = choose(find(name), data=REAL).samples(n=rows, seed=0)
    assert len(dialogues) == rows
    assert len({dialogue.task for dialogue in dialogues}) == families
    assert len({dialogue.task for dialogue in dialogues[:families]}) == families
