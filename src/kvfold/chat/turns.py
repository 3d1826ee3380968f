"""Turns: where the turns of one conversation begin and end among its tokens.

A turn is what the user says, the reply and its closing token; the system prompt belongs to the first one. Turns follow
one another without a gap. Plain integers: it knows no texts, no tokenizer and no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One finished turn: tokens start to reply are read, tokens reply to stop are the reply and its closing."""

    start: int
    reply: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.reply <= self.stop, f"a turn from {self.start} over {self.reply} to {self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start


def follow(turns: Sequence[Turn], *, reply: int, stop: int) -> tuple[Turn, ...]:
    """The turns with one more, which begins where the last one ended.

    >>> follow((), reply=5, stop=9)
    (Turn(start=0, reply=5, stop=9),)
    """
    start = turns[-1].stop if turns else 0
    return (*turns, Turn(start=start, reply=reply, stop=stop))


def folded_until(turns: Sequence[Turn], *, raw: int) -> int:
    """How many of the oldest tokens are folded when the newest `raw` turns stay as they are.

    >>> turns = follow(follow((), reply=5, stop=9), reply=12, stop=20)
    >>> folded_until(turns, raw=0), folded_until(turns, raw=1), folded_until(turns, raw=2)
    (20, 9, 0)
    """
    oldest = turns[: len(turns) - raw] if raw < len(turns) else ()
    return oldest[-1].stop if oldest else 0
