"""Sentences: where a text of token ids may be cut, in linear time, as it comes.

Every vocabulary entry has a mark, one byte made from its decoded text: how good an end it is, and what it does to its
neighbours (a dot inside a number or after "Dr" ends nothing; a closing quote takes the end over). A sentence is cut
where the end is good and its length near the target; text without any ends is cut into pieces of the target length.
It knows bytes and strings only: no tokenizer, no tensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

from kvfold.errors import FileError, PlanError
from kvfold.memory.transcript import APART, CLOSER, LEVEL, SOFT, STEM

Ends: TypeAlias = Mapping[str, int]  # last character -> how good an end it is, of BEST
BEST, WORST = 7, 3  # levels of ends

# How good an end each last character is. The order is that of attention onto delimiters in DynSplit-KV,
# https://arxiv.org/abs/2602.03184, section 3.
ENDS: Final[Ends] = MappingProxyType(
    dict.fromkeys(".!…。！．｡\n", 7)
    | dict.fromkeys("?？", 7)
    | dict.fromkeys(";；:：}", 5)
    | dict.fromkeys(",，、", 4)
    | dict.fromkeys(")]）】", 3)
)
_SOFT_ENDS = frozenset(".,:?!")
_CLOSERS = frozenset("\"')]”’»」』）】")
_STEMS = frozenset(
    (
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "no",
        "vs",
        "etc",
        "fig",
        "eq",
        "sec",
        "vol",
        "jr",
        "sr",
        "inc",
        "ltd",
        "e.g",
        "i.e",
        "cf",
        "al",
        "approx",
    )
)


def mark(text: str, ends: Ends = ENDS) -> int:
    """Mark a vocabulary entry by the text that it decodes to, leading space included."""
    bare = text.strip()
    if "\n" in text and not bare:
        return ends["\n"] | APART
    ended = text.rstrip(" \t")
    core = ended if ended.endswith("\n") else ended.rstrip("".join(_CLOSERS - set(")]"))) or ended
    last = core[-1:]
    level = ends.get(last, 0)
    flags = APART if not (text[:1].isalnum() or text[:1] == "_") else 0
    if bare and set(bare) <= _CLOSERS and not text[:1].isspace():
        flags |= CLOSER
    if last in _SOFT_ENDS and ended.endswith(last):
        flags |= SOFT
    if bare.lower().rstrip(".") in _STEMS or (len(bare) == 1 and bare.isupper() and bare != "I"):
        flags |= STEM
    return level | flags


def table(texts: Iterable[str], ends: Ends = ENDS) -> bytes:
    """Mark every vocabulary entry, in order of ids.

    >>> list(table(["a", ".", "\\n"]))
    [0, 31, 23]
    """
    return bytes(mark(text, ends) for text in texts)


def read_ends(path: str) -> Ends:
    """Read levels from a file of `kvfold delimiters`. Raises FileError for any other file."""
    try:
        ends = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        sound = set(ENDS) <= set(ends) and all(isinstance(level, int) and 0 <= level <= BEST for level in ends.values())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FileError(
            f"ends={path!r} was asked for; it cannot be read ({error}); make it by `kvfold delimiters`"
        ) from None
    if not sound:
        raise FileError(
            f"ends={path!r} was asked for; it holds no level of 0 to {BEST} for every mark; "
            "make it by `kvfold delimiters`"
        )
    return MappingProxyType(ends)


def weights(marks: bytes) -> list[float]:
    """Weigh each token by how good an end it is among its neighbours, 0 to 1.

    The last token's successor is not known: it counts as standing apart.
    """
    levels = [number & LEVEL for number in marks]
    for at, number in enumerate(marks):
        if not levels[at]:
            continue
        before = marks[at - 1] if at else 0
        after = marks[at + 1] if at + 1 < len(marks) else APART
        if number & SOFT and (not after & APART or before & STEM):  # 3.5, or Dr.
            levels[at] = 0
    for at in range(1, len(marks)):
        if marks[at] & CLOSER and levels[at - 1] > levels[at]:
            levels[at], levels[at - 1] = levels[at - 1], 0  # the end is behind the closer
    return [level / BEST for level in levels]


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitter:
    """Sentences of `length` tokens, `window` more or fewer, cut where ends are good."""

    length: int = 32
    window: int = 14  # 0 makes pages of a fixed size
    share: float = 0.8  # of the end's weight in the score of a cut; the rest is closeness to the length

    def __post_init__(self) -> None:
        if self.length < 1 or self.window < 0 or (self.window and self.length - self.window < 3):
            raise PlanError(
                f"sentences of {self.length} tokens, {self.window} more or fewer, were asked for; the shortest has "
                "3 tokens; give a smaller window, or 0 for pages of a fixed size"
            )
        if not 0 <= self.share <= 1:
            raise PlanError(f"a share of {self.share} was asked for; it is a fraction; give 0 to 1")

    @property
    def longest(self) -> int:
        """Count the tokens of the longest sentence."""
        return self.length + self.window

    def cuts(self, marks: bytes) -> tuple[int, ...]:
        """Find where sentences end, as counts of tokens, in a text that begins with a sentence.

        What comes after the last cut may go on: it is cut when it is certain that no later token moves the cut. So the
        cuts of a beginning are the first cuts of the whole, and a text may be cut from any of its cuts on.

        >>> Splitter(length=4, window=0).cuts(bytes(10))
        (4, 8)
        """
        return _cuts(self, bytes(marks))


@lru_cache(maxsize=64)
def _cuts(splitter: Splitter, marks: bytes) -> tuple[int, ...]:
    """Find the cuts once: all layers of a model cut the same text."""
    return tuple(_found(splitter, marks))


def _found(splitter: Splitter, marks: bytes) -> Iterator[int]:
    """Yield the cuts from left to right: each is the best end within the window around the target length."""
    length, window = splitter.length, splitter.window
    if window == 0:
        yield from range(length, len(marks) + 1, length)
        return
    good = weights(marks)
    near = [(1 - splitter.share) * (1 - abs(step) / window) for step in range(-window, window + 1)]
    start = 0
    while start + length + window < len(marks):  # the token after the window decides about the window's last
        first = start + length - window
        ends = good[first - 1 : first + 2 * window]  # a cut after n tokens is at token n - 1
        scores = [splitter.share * end + close for end, close in zip(ends, near, strict=True)]
        start = first + scores.index(max(scores))  # of equal scores the first
        yield start
