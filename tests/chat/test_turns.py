"""Turns cover a conversation without gaps, and the newest of them can be left raw."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.chat.turns import Past, Turn, as_saved, folded_until, follow, from_saved
from kvfold.data import Message

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=12)


def conversation(lengths):
    turns = ()
    for read, said in lengths:
        start = turns[-1].stop if turns else 0
        turns = follow(turns, reply=start + read, stop=start + read + said)
    return turns


@given(LENGTHS)
def test_turns_follow_one_another_without_a_gap(lengths):
    turns = conversation(lengths)
    assert sum(len(turn) for turn in turns) == (turns[-1].stop if turns else 0)
    assert [turn.start for turn in turns] == [0, *(turn.stop for turn in turns)][: len(turns)]


@given(LENGTHS, st.integers(0, 15))
def test_exactly_the_newest_turns_stay_raw(lengths, raw):
    turns = conversation(lengths)
    until = folded_until(turns, raw=raw)
    stays = [turn for turn in turns if turn.start >= until]
    assert len(stays) == min(raw, len(turns))
    assert until + sum(len(turn) for turn in stays) == (turns[-1].stop if turns else 0)


def test_a_turn_reads_something():
    with pytest.raises(AssertionError, match="a turn from 4 over 4"):
        Turn(start=4, reply=4, stop=9)


@given(st.lists(st.integers(2, 5), max_size=6), st.booleans())
def test_every_message_belongs_to_one_turn_over_a_file_too(counts, has_system):
    past = Past(messages=(Message(role="system", content="briefly"),) * has_system)
    for number, count in enumerate(counts, start=1):
        said = [Message(role="user", content=f"{number} {one}") for one in range(count - 1)]
        past = past.followed_by(said, "yes", ids=tuple(range(10 * number)), reply_start=10 * number - 5)
    assert [len(talk) for talk in past.talks] == counts
    assert [message for talk in past.talks for message in talk] == list(past.messages[has_system:])
    if counts:
        assert from_saved(as_saved(past.turns), messages=len(past.messages)) == past.turns
