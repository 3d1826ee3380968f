"""`kvfold advise` at the command line: a table and a sentence, one JSON object, one line where it is stopped."""

import json

from kvfold.bench.advise import advising
from kvfold.cli.main import run

ASKED = ["advise", "--model", "tiny", "--context", "4096", "--memory", "5MB"]


def test_a_forecast_is_a_table_and_one_sentence(capsys):
    assert run([*ASKED, "--forecast"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "4,096 tokens" in out
    assert out.splitlines()[-1].startswith("take int8(rotate=True): ")


def test_json_is_one_object(capsys):
    assert run([*ASKED, "--forecast", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["take"] == "int8(rotate=True)"
    assert said["memory_bytes"] == 5_000_000
    full = next(one for one in said["plans"] if one["plan"] == "full")
    assert full["fits"] is False
    assert list(full["forecast_bytes"]) == ["256", "1024", "4096"]


def test_a_wrong_memory_is_one_line(capsys):
    assert run(["advise", "--memory", "lots"]) == 2
    assert capsys.readouterr().err.startswith("kvfold: memory='lots' was given; ")


def test_ctrl_c_in_a_check_is_one_line(monkeypatch, capsys):
    def stopped(*given, **settings):
        settings["tell"]("reading")
        raise KeyboardInterrupt

    monkeypatch.setattr(advising, "advise_subject", stopped)
    assert run(ASKED) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["opening tiny", "reading", err.splitlines()[-1]]
    assert err.splitlines()[-1].startswith("kvfold: stopped by Ctrl-C")
