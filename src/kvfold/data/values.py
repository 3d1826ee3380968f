"""Values that a reply repeats and that were last said turns ago: what a folded history is asked for in real dialogues.

A value is taken from the slots that a row lists with each message. It counts where it stands word for word in a reply
and in an earlier turn, and in none of the turns between, whatever its case. Values of one or two characters (counts,
ratings) are left out: they are guessed. Knows nothing of tokens.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvfold.data.dialogue import Message
from kvfold.data.files import read_rows
from kvfold.errors import DataError

SHORTEST = 3  # characters of a value


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value in one reply: `message` of the history, from character `start` to `end` of its content."""

    message: int
    start: int
    end: int
    slot: str
    distance: int  # turns since the value was last said


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Dialogues in a row, user and assistant in turn, and the values that can be asked in them."""

    family: str
    messages: tuple[Message, ...]
    values: tuple[Value, ...]


def histories(path: Path, *, n: int, seed: int, joined: int, turns: int | None, distance: int) -> list[History]:
    """`n` histories of `joined` dialogues of the file each, cut after `turns` turns, every one with some value.

    Only values last said at least `distance` turns ago, in the same dialogue. Raises DataError for a file of another
    shape, or with too few such histories.
    """
    rows = read_rows(path, fields=("messages",))
    for number, row in enumerate(rows, 1):
        _check(path, number, row)
    family = path.name.split(".jsonl")[0]
    random.Random(f"histories:{seed}").shuffle(rows)
    groups = [rows[first : first + joined] for first in range(0, len(rows) - joined + 1, joined)]
    every = [_history(family, group, turns, distance) for group in groups]
    found = [history for history in every if history.values]
    if len(found) < n:
        raise DataError(
            f"{n} histories were asked of {path}; {len(found)} of them hold a value last said {distance} turns before "
            "or earlier; ask for fewer with --n, or join fewer"
        )
    return found[:n]


def values(messages: Sequence[Mapping], *, distance: int) -> list[Value]:
    """The values that one dialogue's replies repeat, each reply's in the order of its words."""
    found: list[Value] = []
    for index in range(1, len(messages), 2):
        reply = messages[index]
        for start, slot, value in _spans(reply["content"], reply["slots"]):
            last = _last_mention(value, messages[:index])
            if last is None:
                continue
            age = index // 2 - last // 2
            # The newest mention must be in the same letters: what was only said otherwise is not to be repeated.
            if age >= distance and _places(value, messages[last]["content"], exactly=True):
                end = start + len(value)
                found.append(Value(message=index, start=start, end=end, slot=slot, distance=age))
    return found


def _last_mention(value: str, messages: Sequence[Mapping]) -> int | None:
    """The newest message in which a value stands, whatever its case."""
    mentions = [index for index, message in enumerate(messages) if _places(value, message["content"], exactly=False)]
    return mentions[-1] if mentions else None


def _spans(said: str, slots: Mapping[str, str]) -> list[tuple[int, str, str]]:
    """Where the values first stand in a reply, in its order; of values that overlap, the longest."""
    spans: list[tuple[int, str, str]] = []
    for slot, value in sorted(slots.items(), key=lambda item: -len(item[1])):
        places = _places(value, said, exactly=True) if len(value) >= SHORTEST else []
        if not places:
            continue
        first = places[0]
        end = first + len(value)
        if not any(start < end and first < start + len(other) for start, _, other in spans):
            spans.append((first, slot, value))
    return sorted(spans)


def _places(value: str, text: str, *, exactly: bool) -> list[int]:
    """Where a value stands in a text as whole words."""
    pattern = r"(?<!\w)" + re.escape(value) + r"(?!\w)"
    return [match.start() for match in re.finditer(pattern, text, 0 if exactly else re.IGNORECASE)]


def _history(family: str, group: Sequence[Mapping], turns: int | None, distance: int) -> History:
    messages: list[Message] = []
    found: list[Value] = []
    for row in group:
        offset = len(messages)
        for message in row["messages"]:
            messages.append(Message(role=message["role"], content=message["content"]))
        for value in values(row["messages"], distance=distance):
            found.append(replace(value, message=value.message + offset))
    end = len(messages) if turns is None else min(2 * turns, len(messages))
    inside = tuple(value for value in found if value.message < end)
    return History(family=family, messages=tuple(messages[:end]), values=inside)


def _check(path: Path, number: int, row: Mapping) -> None:
    """Refuse a row that is no dialogue whose messages list their slots."""
    messages = row["messages"]
    roles = [message.get("role") for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"{path} was given; the messages of its row {number} are not user and assistant in turn; give dialogues"
        )
    if not all(isinstance(message.get("slots"), dict) and "content" in message for message in messages):
        raise DataError(
            f"{path} was given; a message of its row {number} lacks slots or content; "
            "give dialogues whose messages hold both"
        )
