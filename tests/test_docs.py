"""The code of README and of the pages: every block of Python runs without a warning (see test_docs_commands.py too)."""

import re
import warnings
from pathlib import Path

import pytest

import kvfold
import kvfold.hf.load
from driving import feed
from fakes import model_of, text

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(language):
    """The code blocks of a language, with the page and the line where each begins."""
    found = []
    for page in PAGES:
        lines = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", lines, flags=re.MULTILINE | re.DOTALL):
            line = lines[: match.start()].count("\n") + 1
            if "OpenAI(" not in match[1]:  # tests/serve/test_page.py has a server for it
                found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.fixture(scope="module")
def tiny():
    return kvfold.load("tiny")


@pytest.fixture
def as_tiny(tiny, monkeypatch, tmp_path):
    """Whatever model a page names is the shipped one, loaded once; files are written to an empty folder."""
    monkeypatch.setattr(kvfold.hf.load, "load", lambda *_, **__: tiny)
    monkeypatch.setitem(kvfold.__dict__, "load", lambda *_, **__: tiny)
    monkeypatch.chdir(tmp_path)


def three_caches():
    """What the page of the server has at hand where it shows a batch: a model and caches of three conversations."""
    model = model_of("llama")
    names = {name: kvfold.cache(model, "full") for name in ("anna", "ben", "clara")}
    for cache in names.values():
        feed(model, text(1, 9), cache)
    return {"model": model, **names}


@pytest.mark.parametrize("block", blocks("python"))
def test_a_block_of_python_runs_without_a_warning(block, as_tiny, capsys):
    names = three_caches() if "BatchedCache" in block else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(block, names)
    assert "deprecated" not in capsys.readouterr().err
