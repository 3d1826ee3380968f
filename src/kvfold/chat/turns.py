"""Turns: what was said in one conversation, and where its turns begin and end among its tokens.

A turn is what the user says, the reply and its closing tokens; the system prompt belongs to the first turn. Turns
follow one another without a gap. These are plain values that know no tokenizer, no model and no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.data import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A finished turn: tokens `start` to `reply` were read, tokens `reply` to `stop` are the reply and its closing."""

    start: int
    reply: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.reply <= self.stop, f"a turn from {self.start} over {self.reply} to {self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """The messages, the fed tokens and the finished turns of a conversation. A finished turn makes a new Past."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...] = ()
    turns: tuple[Turn, ...] = ()

    def followed_by(self, said: str, reply: str, *, ids: tuple[int, ...], reply_start: int) -> "Past":
        """Add a turn: a user's message and its reply. `ids` are all tokens fed since the conversation began."""
        messages = (Message(role="user", content=said), Message(role="assistant", content=reply))
        turns = follow(self.turns, reply=reply_start, stop=len(ids))
        return Past(messages=(*self.messages, *messages), ids=ids, turns=turns)


def follow(turns: Sequence[Turn], *, reply: int, stop: int) -> tuple[Turn, ...]:
    """Add a turn that begins where the last one ended.

    >>> follow((), reply=5, stop=9)
    (Turn(start=0, reply=5, stop=9),)
    """
    start = turns[-1].stop if turns else 0
    return (*turns, Turn(start=start, reply=reply, stop=stop))


def folded_until(turns: Sequence[Turn], *, raw: int) -> int:
    """Count the oldest tokens, which are folded while the newest `raw` turns stay as they are.

    >>> turns = follow(follow((), reply=5, stop=9), reply=12, stop=20)
    >>> folded_until(turns, raw=0), folded_until(turns, raw=1), folded_until(turns, raw=2)
    (20, 9, 0)
    """
    oldest = turns[: max(len(turns) - raw, 0)]
    return oldest[-1].stop if oldest else 0
