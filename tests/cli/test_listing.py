"""What can be named: every member and every suite has its line."""

from kvfold.bench.suites import names
from kvfold.cli.main import run
from kvfold.plan import members


def test_every_member_has_one_line_with_its_models_and_settings(capsys):
    assert run(["plans"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    for axis in ("select", "encode", "place"):
        for name in members(axis):
            assert "[any model]" in lines[name] or "[needs an adapter]" in lines[name]
    assert "[needs an adapter] keep= or tokens= or max_bytes=" in lines["sonic"]
    assert "rotate=False" in lines["int8"]
    assert lines["full"].endswith("[any model]")


def test_every_suite_has_one_line(capsys):
    assert run(["suites"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].replace("-", "_") for line in lines] == names()
    assert all(len(line.split()) > 4 for line in lines)
