"""The command lines of README and of the pages: all are understood, and those that are quick run as they stand.

A line of `kvfold` is parsed with all its options. What is not run as well says why in `why_only_parsed`. Lines of other
programs are checked for what of them is ours: words of make, extras, modules, paths, and what is sent to the server.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
import tomllib
from typing import Any

import pytest
import typer

from kvfold.cli.main import app, run
from test_docs import PAGES, ROOT

GROUP: Any = typer.main.get_command(app)
SLOW = {
    "bench": "takes minutes; tests/bench runs every suite",
    "demo": "takes minutes; `make installed` runs it",
    "train": "takes minutes; tests/train runs each kind",
    "serve": "does not end; tests/serve asks one",
}
PROGRAMS = ("make", "pip", "python", "pytest", "curl", "prlimit", "accelerate", "hf", "export")
FOREIGN = ("hf", "export")  # nothing of theirs is ours


def lines():
    """Every command line with its page: in a block of the shell, or indented by four and begun by a program."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        known = "|".join(("kvfold", *PROGRAMS))
        plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        indented = re.findall(rf"^    ((?:{known}) .*)$", plain, flags=re.MULTILINE)
        for line in [*"".join(blocks).splitlines(), *indented]:
            if line.strip() and not line.startswith("#"):
                found.append((str(page.relative_to(ROOT)), tuple(shlex.split(line, comments=True))))
    return found


LINES = lines()
RUNNERS = ("kvfold", "prlimit", "accelerate")  # what a line may begin with that is one of ours
OURS = [(page, words[words.index("kvfold") + 1 :]) for page, words in LINES if words[0] in RUNNERS]
OTHERS = [(page, words) for page, words in LINES if words[0] != "kvfold"]


def inline():
    """Commands inside sentences and tables, which may leave out what is understood."""
    found = []
    for page in PAGES:
        spans = re.findall(r"`kvfold ([a-z][^`]*)`", page.read_text(encoding="utf-8").replace("\n", " "))
        found += [(str(page.relative_to(ROOT)), tuple(shlex.split(span))) for span in spans]
    return sorted(set(found))


def named(found):
    return {"argvalues": found, "ids": [f"{page}: {' '.join(words)[:40]}" for page, words in found]}


def verb_of(words):
    """The command that the first words name, and the words behind them."""
    command, rest = GROUP, list(words)
    while hasattr(command, "commands") and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    return command, rest


def why_only_parsed(words):
    """Why a line is not run here; None where it is."""
    model = words[words.index("--model") + 1] if "--model" in words else "tiny"
    if words[0] in SLOW:
        return SLOW[words[0]]
    return None if model in ("tiny", "folder/config.json") else "weights that are not shipped"


QUICK = [(page, words) for page, words in OURS if why_only_parsed(words) is None]


@pytest.mark.parametrize(("page", "words"), **named(OURS))
def test_a_command_is_understood(page, words):
    command, rest = verb_of(words)
    with contextlib.suppress(typer.Exit):  # --version prints it and leaves
        command.make_context(words[0], rest)


@pytest.mark.parametrize(("page", "words"), **named(inline()))
def test_a_command_in_a_sentence_has_a_verb_and_options_of_that_verb(page, words):
    command, rest = verb_of(words)
    options = {name for one in command.params for name in one.opts}
    assert {word for word in rest if word.startswith("--")} <= options


@pytest.mark.parametrize("page", sorted({page for page, _ in QUICK}))
def test_the_quick_commands_of_a_page_run_one_after_the_other(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kvfold-runs").symlink_to(ROOT / "docs" / "records" / "chat-tiny")
    sizes = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(sizes))
    for words in [words for where, words in QUICK if where == page]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Anna lives in Turin.\n"))
        code = run(words)
        shown = capsys.readouterr()
        assert code == 0, shown.err
        assert shown.out.strip(), "it said nothing"


@pytest.mark.parametrize("verb", ["plans", "suites"])
def test_what_readme_names_without_a_block_runs(verb, capsys):
    assert run([verb]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


@pytest.mark.parametrize(("page", "words"), **named(OTHERS))
def test_what_other_programs_are_given_of_ours_is_there(page, words):
    program, *rest = words
    if program == "make":
        record = rest[0].removeprefix("docs/records/")
        target = rf"^{rest[0]}:" if record == rest[0] else rf"^{record}_ASKS "
        assert re.search(target, (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        named = re.findall(r"\[(.*)\]", rest[1])
        assert {name for some in named for name in some.split(",")} <= extras.keys()
    elif program == "curl":
        body = json.loads(rest[rest.index("-d") + 1])
        assert body.keys() == {"model", "messages"}
        assert "/v1/chat/completions" in rest[0]
    elif program == "python":
        assert importlib.util.find_spec(rest[1]) if rest[0] == "-m" else (ROOT / rest[0]).exists()
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    else:
        assert program in (*RUNNERS, *FOREIGN), f"say here how a line of {program} is checked"


def test_no_block_is_of_a_language_that_nobody_checks():
    opened = [
        match for page in PAGES for match in re.findall(r"^```(\w*)\n.*?^```", page.read_text("utf-8"), re.M | re.S)
    ]
    assert len(opened) > 20
    assert set(opened) <= {"python", "sh", "text"}, "text is what a program printed"


def test_lines_that_are_only_parsed_are_slow_or_want_weights():
    reasons = {why_only_parsed(words) for _, words in OURS} - {None}
    assert reasons == {*SLOW.values(), "weights that are not shipped"}
    assert len(QUICK) >= 10
