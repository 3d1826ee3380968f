"""How big a file and a function may be, and how a file opens.

Files of the package and of the tests are read alike, docstrings of functions apart. The soft bounds (400 lines, 30
lines) are what we aim at; of the functions a tenth may be longer than the soft bound, none longer than the hard one.
"""

import ast

import pytest
import source

FILE_LINES = 400
FUNCTION_LINES = 60
SOFT_FUNCTION_LINES = 30
OPENING = range(3, 9)

EVERY = [pytest.param(path, id=source.name(path)) for path in (*source.files(), *source.tests())]
OWN = [pytest.param(path, id=source.name(path)) for path in source.files()]


@pytest.mark.parametrize("path", EVERY)
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES, "split it by noun"


@pytest.mark.parametrize("path", EVERY)
def test_a_function_has_at_most_60_lines(path):
    long = [f"{f.name}: {source.length(f)}" for f in source.functions(path) if source.length(f) > FUNCTION_LINES]
    assert not long


def test_nine_functions_of_ten_have_at_most_30_lines():
    every = [source.length(f) for path in source.files() for f in source.functions(path)]
    assert sum(lines > SOFT_FUNCTION_LINES for lines in every) <= len(every) / 10


@pytest.mark.parametrize("path", OWN)
def test_a_file_opens_by_saying_what_it_holds(path):
    opening = ast.get_docstring(source.tree(path), clean=False)
    assert opening is not None, "no docstring at the top"
    if path.name == "__init__.py" and not source.functions(path):
        return  # a folder's one sentence is enough
    lines = opening.strip().splitlines()
    drawn = source.name(path).endswith(("errors.py", "shapes.py"))  # their docstring is a drawing
    assert len(lines) in OPENING or drawn, f"{len(lines)} lines; three to eight say what it holds and what not"
