"""The notebooks run from the first cell to the last, as they are written and where SmolLM2 is missing.

The cells are executed in order in one namespace, as a kernel does. Where the weights of SmolLM2 are missing the
notebooks take tiny by themselves.
"""

import json
from pathlib import Path

import pytest

BOOKS = sorted((Path(__file__).resolve().parents[1] / "docs" / "notebooks").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("book", BOOKS, ids=lambda path: path.stem)


def cells(book):
    return json.loads(book.read_text(encoding="utf-8"))["cells"]


def executed(book):
    """Run the code of a notebook; the names that it leaves."""
    names = {"__name__": "__main__"}
    for cell in cells(book):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{book.name} {cell['id']}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def aside(tmp_path, monkeypatch):
    """Files that a notebook writes go to the test's folder; nothing is downloaded."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_there_are_three():
    assert [book.stem for book in BOOKS] == ["compare-plans", "first-steps", "ten-questions"]


@BY_NAME
def test_a_notebook_explains_its_code_and_is_kept_without_output(book):
    kinds = [cell["cell_type"] for cell in cells(book)]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= kinds.count("code") - 1
    assert all(cell.get("outputs", []) == [] for cell in cells(book))


@pytest.mark.slow
@BY_NAME
def test_a_notebook_takes_the_shipped_model_where_the_weights_are_missing(book, capsys, monkeypatch):
    monkeypatch.setattr("kvfold.hf.load.packaged_file", lambda model: None)
    executed(book)
    assert "smollm2" in capsys.readouterr().out  # what is missing, and the command that brings it


@pytest.mark.slow
@BY_NAME
def test_a_notebook_runs_as_it_is_written(book, capsys):
    left = executed(book)
    assert capsys.readouterr().out
    answered = left.get("right")
    if answered is not None and left["model"].config.name_or_path == "smollm2":
        assert answered >= 6, "most of the ten questions are answered from the folded document"
