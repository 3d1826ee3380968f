"""The source tree as the house tests see it: files, their syntax trees, their imports, their functions.

It reads and parses, and judges nothing; what is allowed stands in the tests. It does not import kvfold.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "kvfold"


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


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, docstring apart."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines
