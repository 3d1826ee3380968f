import json

import pytest
from strangers import stranger

from kvfold.bench.suites import longqa
from kvfold.cli import main

SETTINGS = ["--set", "tokens=300", "--set", "questions=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The stranger in a folder of its own."""
    folder = tmp_path_factory.mktemp("stranger")
    stranger().model.save_pretrained(folder)
    stranger().tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tales(tmp_path):
    path = tmp_path / "fairytaleqa.val.jsonl"
    qa = [{"question": f"What had king {i}?", "answer": f"hat {i}", "kind": "thing"} for i in range(3)]
    path.write_text(json.dumps({"text": "The king had a hat. " * 60, "qa": qa}))
    return path


def bench(*arguments, capsys):
    code = main.run(["bench", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_settings_and_data_reach_the_suite_and_metrics_reach_the_record(model, tales, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(longqa, "REPLY_TOKENS", 4)  # the stranger never stops by itself
    words = ["longqa", "--model", model, "--plans", "snapkv", "--keep", "0.3", "--n", 3, "--out", tmp_path, *SETTINGS]
    code, out, _ = bench(*words, "--set", "question=seen", "--data", tales, "--json", capsys=capsys)
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["plan"] for record in records] == ["full", "none", "snapkv(keep=0.3)"]
    assert [record["query_aware"] for record in records] == [False, False, True]
    for record in records:
        assert record["settings"]["tokens"] == 300
        assert record["settings"]["data"].startswith("fairytaleqa.val.jsonl ")
        assert record["log_likelihood"] < 0.0
        assert record["cut"] == 1.0
    assert str(tmp_path) not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["longqa", "--set", "colour=red"], "lets you set tokens, question, questions"),
        (["longqa", "--set", "tokens=many"], "of type int"),
        (["longqa"], "give --data"),
        (["chat", "--set", "turns=3"], "lets you set nothing"),
        (["chat", "--data", "."], "reads no files"),
        (["longqa", "--data", "nowhere"], "there is no file"),
    ],
)
def test_what_cannot_be_set_is_one_line_and_code_2(arguments, said, model, tmp_path, capsys):
    code, out, err = bench(*arguments, "--model", model, "--n", 1, "--out", tmp_path, capsys=capsys)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("kvfold: ")]
    assert said in line
    assert err.endswith(line + "\n")
