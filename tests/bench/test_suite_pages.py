"""Every suite has a page whose commands are real: options, settings, plans and rivals that the program takes."""

import shlex
from pathlib import Path

import pytest
import typer

from kvfold.bench import suites
from kvfold.bench.choices import choose
from kvfold.bench.peers import plans as rivals
from kvfold.bench.run import jobs
from kvfold.cli.bench import KEEPS
from kvfold.cli.main import app

PAGES = Path(__file__).resolve().parents[2] / "docs" / "suites"
COMMAND = typer.main.get_command(app).commands["bench"]


def page(name: str) -> str:
    return (PAGES / f"{name.replace('_', '-')}.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of each `kvfold bench` command of a page, comments apart; a line may go on after a backslash."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("    kvfold bench ")]
    return [words[2:] for words in found]


def test_every_page_is_of_a_suite():
    assert sorted(path.stem.replace("-", "_") for path in PAGES.glob("*.md")) == suites.names()


@pytest.mark.parametrize("name", suites.names())
def test_the_commands_of_a_page_are_understood(name):
    found = commands(page(name))
    assert found, "a page says how its suite is run"
    for words in found:
        given = COMMAND.make_context("bench", list(words)).params
        assert given["suite"].replace("-", "_") == name
        sizes = jobs.sizes(given["keep"], usual=KEEPS)
        chosen = choose(suites.find(given["suite"]), given=given["settings"] or ())
        assert jobs.parse_jobs(given["plans"].replace("...", "full"), **sizes, scopes=chosen.scopes)
        rivals.parse_all(given["peers"], **sizes)
        assert given["data"] is None or chosen.data_file, "only a suite that reads files is given some"


@pytest.mark.parametrize("name", suites.names())
def test_a_page_says_how_long_its_suite_takes_and_which_version_it_is(name):
    text = page(name)
    assert any(word in text for word in ("seconds", "minute", " s of CPU time")), "say what the command takes"
    assert f"\nVersion {suites.find(name).version}" in text
