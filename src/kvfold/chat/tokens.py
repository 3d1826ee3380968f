"""Tokens of a text with their places in it, so that a rendered dialogue can be cut at characters.

A text is tokenized as a whole and its tokens are then shared out among the pieces: a model that reads the pieces reads
what it would read without any cut. This file knows no messages and no templates.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvfold.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """The tokens of one text, and the characters at which each of them starts and ends."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> "TextTokens":
        """Tokenize a text without special tokens. Raises ModelError for a tokenizer that cannot say offsets."""
        if not tokenizer.is_fast:
            raise ModelError(
                "a text was to be cut into tokens; this tokenizer does not say where its tokens stand in the text; "
                "use a model with a fast tokenizer"
            )
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = read["offset_mapping"]
        return cls(
            ids=tuple(read["input_ids"]),
            starts=tuple(start for start, _ in places),
            ends=tuple(end for _, end in places),
        )

    def until(self, character: int) -> int:
        """Count the tokens up to a character. A token across it is not counted: it is known only later."""
        return bisect_right(self.ends, character)

    def between(self, start: int, end: int) -> range:
        """Find the tokens that say these characters, wholly or in part."""
        return range(self.until(start), bisect_left(self.starts, end))

    def cut(self, ends: Sequence[int]) -> list[tuple[int, ...]]:
        """Cut the ids into pieces that end at these characters, of which the last one is the end of the text."""
        stops = [self.until(end) for end in ends]
        assert stops[-1] == len(self.ids), "the last piece ends with the text"
        return [self.ids[start:stop] for start, stop in pairwise([0, *stops])]
