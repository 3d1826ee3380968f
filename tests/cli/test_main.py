import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.cli import main
from kvfold.cli.reference import reference
from kvfold.errors import PlanError

ROOT = Path(__file__).resolve().parents[2]


def cpu_seconds(*arguments: str) -> float:
    """CPU time, user and system, of one run of the installed program; waiting for the machine is not counted."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "kvfold", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_costs_less_than_half_a_second_of_cpu_time():
    cpu_seconds("--help")  # the first run may have to write byte code
    assert min(cpu_seconds("--help") for _ in range(3)) < 0.5


def test_a_forecast_costs_less_than_two_seconds_of_cpu_time():
    asked = ("advise", "--model", "tiny", "--memory", "5MB", "--forecast")
    cpu_seconds(*asked)  # the first run may have to write byte code
    assert min(cpu_seconds(*asked) for _ in range(2)) < 2


def test_help_of_a_verb_imports_nothing_heavy():
    program = """
import sys
from kvfold.cli.main import run
for verb in ("demo", "bench", "report", "chat", "train", "inspect", "advise"):
    assert run([verb, "--help"]) == 0, verb
heavy = {"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "arguments", [["--colour"], ["bench", "--colour"], ["knit"], ["bench"], ["report", "--json=1"]]
)
def test_a_wrong_command_line_is_one_line_and_code_2(arguments, capsys):
    assert main.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvfold: ")
    assert err.count("\n") == 1
    assert "--help" in err


def test_an_error_of_the_library_is_one_line_and_code_2(monkeypatch, capsys):
    def refuse(*_, **__):
        raise PlanError("you gave 'x';\nit is no plan;\ngive one of full, none")

    monkeypatch.setattr(main.typer.main, "get_command", lambda _: type("Command", (), {"main": refuse}))
    assert main.run(["demo"]) == 2
    assert capsys.readouterr().err == "kvfold: you gave 'x'; it is no plan; give one of full, none\n"


def test_ctrl_c_is_one_line_and_code_130(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(main.typer.main, "get_command", lambda _: type("Command", (), {"main": stop}))
    assert main.run(["demo"]) == 130
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_no_arguments_print_the_help(capsys):
    assert main.run([]) == 0
    assert "Usage: kvfold" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    import kvfold

    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"kvfold {kvfold.__version__}\n"


def test_the_page_of_the_command_line_is_fresh():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "stale; run `make docs`"
