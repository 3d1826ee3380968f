import json

import coins
import pytest

import kvfold.bench.subject
import kvfold.bench.suites
from kvfold.cli.main import run

PLANS = ["--plans", "streaming_llm", "--keep", "0.5"]
PLAN = "streaming_llm(keep=0.5)"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`kvfold bench coins` on a suite without a model; what it is called with and what it returns are real."""
    monkeypatch.setitem(coins.SHARES, PLAN, 0.5)
    monkeypatch.setattr(kvfold.bench.subject, "open_subject", lambda *_, **__: coins.SUBJECT)

    def call(*arguments, **faults):
        monkeypatch.setattr(kvfold.bench.suites, "find", lambda _: coins.Coins(**faults))
        return run(["bench", "coins", *PLANS, "--n", "8", "--out", str(tmp_path), *arguments])

    return call


def refusal(capsys, *arguments) -> str:
    """The one line that a command line is refused with."""
    assert run([*arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_json_prints_a_record_per_line_and_nothing_else(bench, capsys):
    assert bench("--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["plan"] for line in out.splitlines()] == ["full", "none", PLAN]
    assert f"{PLAN}: score 0.500" in err


def test_without_json_there_is_a_table_and_where_the_records_are(bench, capsys, tmp_path):
    assert bench() == 0
    out = capsys.readouterr().out
    assert PLAN in out
    assert str(tmp_path / "records.jsonl") in out


def test_ctrl_c_in_the_middle_keeps_what_was_finished_and_the_next_call_goes_on(bench, capsys, tmp_path):
    assert bench(breaks_at=PLAN, error=KeyboardInterrupt) == 130
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "kvfold: stopped by Ctrl-C; files that were finished before are kept"
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2 * 4  # of two plans
    assert bench("--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert not (tmp_path / "samples.jsonl").exists()


def test_minutes_that_are_no_time_at_all_are_said_in_one_line(bench, capsys):
    assert bench("--minutes", "0") == 2
    assert "--minutes" in capsys.readouterr().err


def test_an_unknown_suite_names_what_is_near(capsys):
    assert "did you mean chat?" in refusal(capsys, "bench", "chatt")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plans", "snapvk(keep=0.5)"], "snapkv"),
        (["--plans", "snapkv(kep=0.5)", "--keep", ""], "no such setting"),
        (["--plans", "snapkv + h2o"], "what stays"),
        (["--plans", "snapkv(keep="], "cannot be read"),
        (["--plans", ";"], "give one or more"),
        (["--keep", "half"], "lies above 0 and up to 1"),
        (["--model", "no-such-model-here"], "no-such-model-here"),
        (["--dtype", "float8"], "float32, bfloat16, float16"),
        (["--device", "abacus"], "give cpu or cuda"),
        (["--n", "0"], "--help"),
        (["--set", "turns=3"], "turns"),
        (["--executor", "cloud"], "auto, here, processes and ray"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said in refusal(capsys, "bench", "chat", "--n", "4", "--out", str(tmp_path), *arguments)


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(bench, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert bench("--out", str(tmp_path / "file")) == 2
    assert "no folder can be there" in capsys.readouterr().err


def test_a_spoilt_record_is_said_and_left_alone(bench, capsys, tmp_path):
    (tmp_path / "records.jsonl").write_text("rubbish\n")
    assert bench() == 2
    assert "line 1 was read as a record; it is not JSON" in capsys.readouterr().err
    assert (tmp_path / "records.jsonl").read_text() == "rubbish\n"
