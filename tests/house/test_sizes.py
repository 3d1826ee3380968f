"""How big a file, a function and a class may be, how dense a folder is written, and how a file opens.

Files of the package and of the tests are read alike, docstrings of functions apart. Of the functions a tenth may be
longer than the soft bound, none longer than the hard one. Size without density would reward golf: so a folder has at
most 11 syntax nodes a line of code (projects that read well have 8 to 9), and the core one comment for few lines.
"""

import ast

import source

FILE_LINES = 400
FUNCTION_LINES = 40
CLASS_LINES = 200
NODES_A_LINE = 11
LINES_A_COMMENT = 10  # about one for eight is meant
CORE = ("memory", "attention", "encode/lowrank")  # where an index, a mask or a sign is not obvious
TESTED = 0.6  # lines of tests beside a line of the core
PART_MEMBERS = 12
MEMORY_MEMBERS = 15
SOFT_FUNCTION_LINES = 30
OPENING = range(3, 9)

EVERY = (*source.files(), *source.tests())


def test_a_file_has_at_most_400_lines():
    lines = {source.name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERY}
    assert not {name: count for name, count in lines.items() if count > FILE_LINES}, "split it by noun"


def test_a_function_has_at_most_40_lines():
    assert not [
        f"{source.at(path, function)} {function.name}: {source.length(function)} lines"
        for path in EVERY
        for function in source.functions(path)
        if source.length(function) > FUNCTION_LINES
    ]


def test_nine_functions_of_ten_have_at_most_30_lines():
    every = [source.length(f) for path in source.files() for f in source.functions(path)]
    assert sum(lines > SOFT_FUNCTION_LINES for lines in every) <= len(every) / 10


def test_a_class_has_at_most_200_lines():
    assert not [
        f"{source.at(path, one)} {one.name}: {source.lines_of(one)} lines"
        for path in EVERY
        for one in source.classes(path)
        if source.lines_of(one) > CLASS_LINES
    ]


def rooms():
    """The files of each folder of the package that holds some."""
    found = {}
    for path in source.files():
        found.setdefault(source.room(path), []).append(path)
    return found


def test_a_folder_has_at_most_11_syntax_nodes_a_line_of_code():
    density = {
        room: sum(map(source.nodes, paths)) / max(sum(map(source.code_lines, paths)), 1)
        for room, paths in rooms().items()
    }
    dense = {room: round(nodes, 2) for room, nodes in density.items() if nodes > NODES_A_LINE}
    assert not dense, "one statement a line, and a name for what is computed on the way"


def test_the_core_says_why_in_a_comment_for_every_ten_lines_of_code():
    sparse = {}
    for room in CORE:
        paths = rooms()[room]
        lines = sum(map(source.code_lines, paths)) / max(sum(map(source.comments, paths)), 1)
        if lines > LINES_A_COMMENT:
            sparse[room] = round(lines, 1)
    assert not sparse, "lines of code a comment"


def test_the_core_has_six_lines_of_tests_beside_ten_of_its_own():
    def lines(folder):
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))

    beside = {room: lines(source.ROOT / "tests" / room) / lines(source.SOURCE / room) for room in ("memory",)}
    assert not {room: round(share, 2) for room, share in beside.items() if share < TESTED}


def test_a_part_has_at_most_12_members():
    part = source.class_named(source.SOURCE / "memory" / "part.py", "Part")
    assert len(source.members(part)) <= PART_MEMBERS, sorted(source.members(part))


def test_a_memory_has_at_most_15_public_members():
    memory = source.class_named(source.SOURCE / "memory" / "memory.py", "Memory")
    public = source.members(memory) | source.attributes(memory)
    assert len(public) <= MEMORY_MEMBERS, sorted(public)


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
