"""Delimiter classes: what one byte says of a token as the end of a sentence. A tokenizer's table gives each id one.

The lowest bits are a level: how good an end the token is. The others say what it does to its neighbours. Bytes and
arrays of bytes only; who cuts text where is place/sentences.py.
"""

from typing import Any

LEVEL = 0b111  # bits of a mark: how good an end
SOFT = 0b1000  # an end only where what follows stands apart
APART = 0b10000  # begins with a space, a new line, or something that is no letter or digit
CLOSER = 0b100000  # quotes and brackets that belong to what is before them
STEM = 0b1000000  # a dot after it is no end: Dr, e.g, a single letter
_STRONG = 5  # the least level that ends a sentence by itself


def ends(marks: Any, after: Any) -> Any:
    """Whether a sentence ends at a token, by its mark and its successor's; of numbers, or arrays of them."""
    strong = (marks & LEVEL) >= _STRONG
    inside = ((marks & SOFT) != 0) & ((after & APART) == 0)
    return strong & ~inside
