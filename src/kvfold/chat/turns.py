"""Turns: what was said in one conversation, and where its turns begin and end among its tokens.

A turn is what the user says, the reply and its closing tokens; the system prompt belongs to the first turn. A server's
turn may hold more messages, which were read at once. Turns follow one another without a gap, among the tokens and among
the messages. These are plain values that know no tokenizer, no model and no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from kvfold.data import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A finished turn: tokens `start` to `reply` were read, tokens `reply` to `stop` are the reply and its closing."""

    start: int
    reply: int
    stop: int
    messages: int = 2  # with the reply, and in the first turn with the system prompt

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

    def followed_by(self, said: Sequence[Message], reply: str, *, ids: tuple[int, ...], reply_start: int) -> "Past":
        """Add a turn: what was said, and the reply. `ids` are all tokens fed since the conversation began."""
        messages = (*self.messages, *said, Message(role="assistant", content=reply))
        count = len(messages) - sum(turn.messages for turn in self.turns)
        turns = follow(self.turns, reply=reply_start, stop=len(ids), messages=count)
        return Past(messages=messages, ids=ids, turns=turns)

    @property
    def talks(self) -> list[tuple[Message, ...]]:
        """The messages of each turn, without the system prompt before the first one."""
        ends = [0, *accumulate(turn.messages for turn in self.turns)]
        if self.messages and self.messages[0].role == "system":
            ends[0] = 1
        return [self.messages[start:end] for start, end in pairwise(ends)]


def follow(turns: Sequence[Turn], *, reply: int, stop: int, messages: int = 2) -> tuple[Turn, ...]:
    """Add a turn that begins where the last one ended.

    >>> follow((), reply=5, stop=9)
    (Turn(start=0, reply=5, stop=9, messages=2),)
    """
    start = turns[-1].stop if turns else 0
    return (*turns, Turn(start=start, reply=reply, stop=stop, messages=messages))


def as_saved(turns: Sequence[Turn]) -> list[list[int]]:
    """Give turns as a file has them: a fourth number says how many messages a later turn has, where these are not two.

    >>> as_saved(follow(follow((), reply=5, stop=9, messages=4), reply=12, stop=20))
    [[0, 5, 9], [9, 12, 20]]
    """
    counts = [[] if number == 0 or turn.messages == 2 else [turn.messages] for number, turn in enumerate(turns)]
    return [[turn.start, turn.reply, turn.stop, *count] for turn, count in zip(turns, counts, strict=True)]


def from_saved(rows: Sequence[Sequence[int]], *, messages: int) -> tuple[Turn, ...]:
    """Read turns as a file has them; the first one has the messages that the others leave.

    >>> from_saved([[0, 5, 9], [9, 12, 20]], messages=6)
    (Turn(start=0, reply=5, stop=9, messages=4), Turn(start=9, reply=12, stop=20, messages=2))
    """
    later = [row[3] if len(row) > 3 else 2 for row in rows[1:]]
    counts = [messages - sum(later), *later]
    return tuple(
        Turn(start=row[0], reply=row[1], stop=row[2], messages=count)
        for row, count in zip(rows, counts[: len(rows)], strict=True)
    )


def folded_until(turns: Sequence[Turn], *, raw: int) -> int:
    """Count the oldest tokens, which are folded while the newest `raw` turns stay as they are.

    >>> turns = follow(follow((), reply=5, stop=9), reply=12, stop=20)
    >>> folded_until(turns, raw=0), folded_until(turns, raw=1), folded_until(turns, raw=2)
    (20, 9, 0)
    """
    oldest = turns[: max(len(turns) - raw, 0)]
    return oldest[-1].stop if oldest else 0
