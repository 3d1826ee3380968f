"""How big a file and a function may be, and how a file opens.

Files of the package and of the tests are read alike, docstrings of functions apart. The soft bounds (400 lines, 30
lines) are what we aim at; of the functions a tenth may be longer than the soft bound, none longer than the hard one.
"""

import ast

import source

FILE_LINES = 400
FUNCTION_LINES = 60
SOFT_FUNCTION_LINES = 30
OPENING = range(3, 9)

EVERY = (*source.files(), *source.tests())


def test_a_file_has_at_most_400_lines():
    lines = {source.name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERY}
    assert not {name: count for name, count in lines.items() if count > FILE_LINES}, "split it by noun"


def test_a_function_has_at_most_60_lines():
    assert not [
        f"{source.at(path, function)} {function.name}: {source.length(function)} lines"
        for path in EVERY
        for function in source.functions(path)
        if source.length(function) > FUNCTION_LINES
    ]


def test_nine_functions_of_ten_have_at_most_30_lines():
    every = [source.length(f) for path in source.files() for f in source.functions(path)]
    assert sum(lines > SOFT_FUNCTION_LINES for lines in every) <= len(every) / 10


def test_a_file_opens_by_saying_what_it_holds():
    wrong = []
    for path in source.files():
        opening = ast.get_docstring(source.tree(path), clean=False)
        if opening is None:
            wrong.append(f"{source.name(path)}: no docstring at the top")
            continue
        if path.name == "__init__.py" and not source.functions(path):
            continue  # a folder's one sentence is enough
        lines = opening.strip().splitlines()
        drawn = source.name(path).endswith(("errors.py", "shapes.py"))  # their docstring is a drawing
        if len(lines) not in OPENING and not drawn:
            wrong.append(f"{source.name(path)}: {len(lines)} lines; three to eight say what it holds and what not")
    assert not wrong
