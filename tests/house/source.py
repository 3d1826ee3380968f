"""The source tree as the house tests see it: files, syntax trees, imports, functions, classes, shapes and density.

It reads and parses, and judges nothing; what is allowed stands in the tests. It does not import kvfold.
"""

import ast
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "kvfold"
STEERING = ("# noqa", "# type:", "# fmt:", "# pyright:")  # comments for tools, not for readers
SHAPED = {"Float", "Int", "Int8", "UInt8", "Bool", "Num", "Shaped", "Integer", "Inexact", "Complex"}


@cache
def files() -> tuple[Path, ...]:
    """Every Python file of the package."""
    return tuple(sorted(SOURCE.rglob("*.py")))


@cache
def tests() -> tuple[Path, ...]:
    """Every Python file of the tests."""
    return tuple(sorted((ROOT / "tests").rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    """How a message calls a file: its path from the root of the repository."""
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    """The folder that a file lies in, the unit of density: `bench/run` for bench/run/pool.py, `.` for plan.py."""
    return path.relative_to(SOURCE).parent.as_posix()


def folder(path: Path) -> str:
    """The first part of a file's place in the package, the unit of the import table: `plan` for plan.py."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One module that a file names in an import statement, wherever in the file that stands."""

    module: str
    line: int
    at_import: bool  # reached when the module is imported: not inside a function, not only for type checkers


def at(path: Path, place: Import | ast.stmt) -> str:
    """Where something stands, as editors read it: file and line."""
    return f"{name(path)}:{place.line if isinstance(place, Import) else place.lineno}"


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _walk(node: ast.AST, at_import: bool, found: list[Import]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [Import(module=a.name, line=child.lineno, at_import=at_import) for a in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            names = [child.module or ""]
            if child.module == "kvfold":
                names = [f"kvfold.{a.name}" for a in child.names]
            found += [Import(module=n, line=child.lineno, at_import=at_import) for n in names]
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _only_for_types(child)
        _walk(child, at_import and not inside, found)


def imports(path: Path) -> list[Import]:
    """All imports of a file, those inside functions too."""
    found: list[Import] = []
    _walk(tree(path), True, found)
    return found


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def classes(path: Path) -> list[ast.ClassDef]:
    return [n for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef)]


def class_named(path: Path, wanted: str) -> ast.ClassDef:
    """The class of that name in a file."""
    (found,) = (one for one in classes(path) if one.name == wanted)
    return found


def lines_of(node: ast.stmt) -> int:
    """Lines from the first to the last of a statement, docstrings and comments included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, docstring apart."""
    docstring = 0 if ast.get_docstring(function) is None else lines_of(function.body[0])
    return lines_of(function) - docstring


def members(of: ast.ClassDef) -> set[str]:
    """Methods and properties of a class that a caller may use: those without a leading underscore."""
    functions = {n.name for n in of.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in functions if not name.startswith("_")}


def attributes(of: ast.ClassDef) -> set[str]:
    """Names without a leading underscore that a class declares or that its methods set on `self`."""
    declared = {n.target.id for n in of.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    written = {
        n.attr
        for n in ast.walk(of)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"
    }
    return {name for name in declared | written if not name.startswith("_")}


def nodes(path: Path) -> int:
    """Syntax nodes of a file, all that `ast.walk` gives."""
    return sum(1 for _ in ast.walk(tree(path)))


def docstring_lines(path: Path) -> set[int]:
    """Numbers of the lines that docstrings take in a file."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [n.body[0] for n in ast.walk(tree(path)) if isinstance(n, holders) and ast.get_docstring(n) is not None]
    return {line for one in first for line in range(one.lineno, one.lineno + lines_of(one))}


def code_lines(path: Path) -> int:
    """Lines of a file that are neither blank, nor a comment, nor part of a docstring."""
    written = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    code = {number for number, line in written if line.strip() and not line.lstrip().startswith("#")}
    return len(code - docstring_lines(path))


def comments(path: Path) -> int:
    """Comments of a file, at the end of a line or alone on it; those that only steer a tool are not counted."""
    with path.open("rb") as file:
        found = [token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    return sum(not comment.startswith(STEERING) for comment in found)


def shapes(path: Path) -> list[tuple[int, str]]:
    """Every jaxtyping shape of a file, `B H S D`, and the line on which it stands."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in SHAPED:
            _, shape = node.slice.elts  # Float[Tensor, "B H S D"]
            found.append((node.lineno, shape.value))
    return found


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a folder's name stands for its `__init__`."""
    found = {}
    for path in files():
        parts = ("kvfold", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def known_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file that stands."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                below = f"{node.module}.{name.name}"  # `from kvfold.memory import fold` names a module or a value
                found.add(below if below in modules() else str(node.module))
    return found & modules().keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more that reach each other along the edges of a graph (its strongly connected parts)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {one: reached(one) for one in graph}
    groups = {frozenset(other for other in reach[one] if one in reach[other]) for one in graph if one in reach[one]}
    return sorted(sorted(group) for group in groups)
