import pytest
from stub_judge import refuse

from kvfold.bench.judging.endpoint import Endpoint
from kvfold.bench.judging.judge import Judge
from kvfold.bench.judging.notebook import Notebook
from kvfold.errors import SuiteError


def prompts(count):
    return [[{"role": "user", "content": f"reply {i}"}] for i in range(count)]


def make(judge, path, *, model="wise", at_a_time=1, tries=1):
    endpoint = Endpoint(url=judge.url, model=model, pause_seconds=0.0, limit_seconds=10.0, tries=tries)
    return Judge(endpoint=endpoint, notebook=None if path is None else Notebook(path), at_a_time=at_a_time)


def test_scores_come_in_the_order_of_the_prompts(judge):
    judge.answers = [f"[[{i}]]" for i in range(1, 10)]
    assert make(judge, None).scores(prompts(9)) == [float(i) for i in range(1, 10)]


def test_many_at_a_time_ask_each_prompt_once(judge, tmp_path):
    assert make(judge, tmp_path / "n", at_a_time=8).scores(prompts(30)) == [7.0] * 30
    said = sorted(body["messages"][0]["content"] for body in judge.asked)
    assert said == sorted(f"reply {i}" for i in range(30))


def test_a_judgement_is_made_once_and_kept_with_the_judges_words(judge, tmp_path):
    make(judge, tmp_path / "n").scores(prompts(2))
    judge.answers = ["[[1]]"]
    assert make(judge, tmp_path / "n").scores(prompts(3)) == [7.0, 7.0, 1.0]
    assert len(judge.asked) == 3
    text = (tmp_path / "n").read_text()
    assert "Fine. Rating: [[7]]" in text


def test_another_judge_is_asked_for_itself(judge, tmp_path):
    make(judge, tmp_path / "n").scores(prompts(1))
    make(judge, tmp_path / "n", model="wiser").scores(prompts(1))
    assert [body["model"] for body in judge.asked] == ["wise", "wiser"]


@pytest.mark.parametrize("at_a_time", [1, 4])
def test_when_the_judge_gives_up_finished_judgements_are_kept(judge, tmp_path, at_a_time):
    judge.answers = ["[[4]]", "[[5]]", "[[6]]", refuse(503, "out of breath")]
    with pytest.raises(SuiteError, match=r"out of breath.*finished judgements are kept"):
        make(judge, tmp_path / "n", at_a_time=at_a_time).scores(prompts(12))
    kept = (tmp_path / "n").read_text().count('"score"')
    assert kept == 3
    failed = len(judge.asked) - kept
    judge.answers = ["[[9]]"]
    scores = make(judge, tmp_path / "n").scores(prompts(12))
    assert sorted(scores) == [4.0, 5.0, 6.0] + [9.0] * 9
    assert len(judge.asked) == 12 + failed
