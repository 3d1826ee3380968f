"""Which names are allowed: folders in ordinary words, one word for one thing, and the public face.

Textual and quick. What a name means stands in the design; this file only keeps the banned ones out, and holds that
every public name can be loaded and is written where it is promised.
"""

import ast
import re

import pytest
import source

import kvfold
from kvfold.plan import members

BANNED_PLACES = {"utils", "util", "common", "core", "helpers", "helper", "manager", "misc"}
BANNED_WORDS = re.compile(r"\b(kv_len|past_len|cur_len|hasattr)\b")
FUTURE = "from __future__ import annotations"

NO_PAPER = {"full", "none", "dense", "device"}
METHODS = [
    path
    for path in source.files()
    if source.folder(path) in ("select", "encode", "place") and path.parent.parent == source.SOURCE
    and path.stem in {name for axis in ("select", "encode", "place") for name in members(axis)} - NO_PAPER
]  # fmt: skip


def names(path) -> set[str]:
    """Every identifier of a file: what strings and comments say is not counted."""
    found = set()
    for node in ast.walk(source.tree(path)):
        found |= {getattr(node, field, None) for field in ("id", "attr", "arg", "name")}
    return {name for name in found if isinstance(name, str)}


def test_places_have_ordinary_names():
    def parts(path):
        return {part.removesuffix(".py") for part in path.relative_to(source.SOURCE).parts}

    assert not [source.name(path) for path in source.files() if parts(path) & BANNED_PLACES]


def test_one_word_for_one_thing():
    assert not [
        f"{source.name(path)}: {name}"
        for path in source.files()
        for name in sorted(names(path))
        if BANNED_WORDS.search(name)
    ]


def test_annotations_are_values():
    late = [source.name(path) for path in source.files() if FUTURE in path.read_text(encoding="utf-8")]
    assert not late, "jaxtyping reads the annotations at run time"


def test_a_value_type_is_frozen_unless_its_docstring_says_that_it_changes():
    wrong = []
    for path in source.files():
        for node in ast.walk(source.tree(path)):
            if not isinstance(node, ast.ClassDef):
                continue
            for decorator in node.decorator_list:
                if ast.unparse(decorator).split("(")[0] == "dataclass":
                    frozen = "frozen=True" in ast.unparse(decorator)
                    changes = "change" in (ast.get_docstring(node) or "").lower()
                    wrong += [] if frozen or changes else [f"{source.at(path, node)}: {node.name}"]
    assert not wrong, "neither frozen nor says that it changes"


def test_the_public_face_is_small_sorted_and_real():
    assert len(kvfold.__all__) <= 12
    assert list(kvfold.__all__) == sorted(kvfold.__all__)
    for name in kvfold.__all__:
        value = getattr(kvfold, name)
        assert callable(value)
        assert value.__name__ == name


def test_an_unknown_public_name_lists_the_real_ones():
    with pytest.raises(AttributeError, match="its public names are Chat"):
        kvfold.fold_everything  # noqa: B018


def test_a_method_cites_its_paper_and_says_how_ours_differs():
    opening = {source.name(path): ast.get_docstring(source.tree(path)) or "" for path in METHODS}
    assert opening
    assert not [name for name, text in opening.items() if not re.search(r"https://\S+", text)], "no link to the paper"
    differs = re.compile(r"^Ours differs: \S", flags=re.MULTILINE)
    assert not [name for name, text in opening.items() if not differs.search(text)], "no line `Ours differs: ...`"
