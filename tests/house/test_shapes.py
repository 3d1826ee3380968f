"""Which sizes a shape may name: the letters of the legend in kvfold/shapes.py, numbers, and words written out.

A letter means one thing in the whole package, so that a signature can be read without its file.
"""

import re

import source

from kvfold.shapes import LEGEND

SIGNS = "#*?_"  # jaxtyping's: may broadcast, several at once, not compared, not checked
WORD = re.compile(r"[a-z][a-z_]{2,}")  # two letters are an abbreviation, not a word
NUMBER = re.compile(r"[0-9]+")


def known(size: str) -> bool:
    return size in LEGEND or bool(WORD.fullmatch(size)) or bool(NUMBER.fullmatch(size))


def test_every_size_in_a_shape_is_a_letter_of_the_legend_or_a_word():
    wrong = []
    for path in source.files():
        for line, shape in source.shapes(path):
            sizes = [size.lstrip(SIGNS) for size in shape.split()]
            unknown = [size for size in sizes if size not in ("", "...") and not known(size)]
            wrong += [f"{source.name(path)}:{line}: `{shape}` has {', '.join(unknown)}"] * bool(unknown)
    assert not wrong, "use a letter of kvfold/shapes.py, or a word"


def test_every_letter_of_the_legend_is_used_and_drawn():
    used = {size.lstrip(SIGNS) for path in source.files() for _, shape in source.shapes(path) for size in shape.split()}
    assert LEGEND.keys() <= used
    drawing = (source.SOURCE / "shapes.py").read_text(encoding="utf-8").split('"""')[1]
    assert not [f"{letter}  {meaning}" for letter, meaning in LEGEND.items() if f"{letter}  {meaning}" not in drawing]
