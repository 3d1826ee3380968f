import json
import os
import re
from pathlib import Path

import pytest

from kvfold.data.values import histories, values
from kvfold.errors import DataError

REAL = Path(os.environ.get("KVFOLD_DATA", "/nowhere")) / "eval" / "sgd.dev.jsonl.xz"


def row(*turns):
    """A dialogue from (user, assistant, slots of the reply) in turn."""
    messages = []
    for said, reply, slots in turns:
        messages += [{"role": "user", "content": said, "slots": {}}]
        messages += [{"role": "assistant", "content": reply, "slots": slots}]
    return {"messages": messages}


TABLE = row(
    ("A table at Sino in San Jose.", "For how many?", {}),
    ("For two, at 11:30 am.", "Which day?", {}),
    ("Today.", "So Sino, San Jose, at 11:30 am?", {"name": "Sino", "city": "San Jose", "time": "11:30 am"}),
    ("Yes.", "Sino is booked.", {"name": "Sino"}),
)


def found(dialogue, distance=1):
    messages = dialogue["messages"]
    return [
        (value.message, messages[value.message]["content"][value.start : value.end], value.distance)
        for value in values(messages, distance=distance)
    ]


def test_values_are_those_of_earlier_turns_with_their_age():
    assert found(TABLE) == [(5, "Sino", 2), (5, "San Jose", 2), (5, "11:30 am", 1), (7, "Sino", 1)]
    assert found(TABLE, distance=2) == [(5, "Sino", 2), (5, "San Jose", 2)]


def test_a_value_said_again_in_the_same_turn_is_not_asked():
    assert found(row(("In Rome.", "ok", {}), ("Is it Rome?", "Yes, Rome.", {"city": "Rome"}))) == []


def test_another_case_is_a_mention_but_nothing_to_repeat():
    again = row(("In Rome.", "ok", {}), ("ROME!", "ok", {}), ("And?", "It is Rome.", {"city": "Rome"}))
    assert found(again) == []
    assert found(again, distance=2) == []


def test_short_values_parts_of_words_and_parts_of_longer_values_are_left_out():
    counts = row(("For 2, in Long Beach.", "ok", {}), ("?", "2 at Long Beach", {"seats": "2", "city": "Long Beach"}))
    assert found(counts) == [(3, "Long Beach", 1)]
    inside = row(("A barber, please: bar none.", "ok", {}), ("?", "The barber.", {"kind": "bar"}))
    assert found(inside) == []
    hotel = {"city": "Long Beach", "name": "Pike Long Beach"}
    nested = row(("Pike Long Beach or Long Beach?", "ok", {}), ("?", "Pike Long Beach.", hotel))
    assert found(nested) == [(3, "Pike Long Beach", 1)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "errands.jsonl"
    dull = row(("Hello.", "Hello.", {}), ("Bye.", "Bye.", {}))
    file.write_text("\n".join(json.dumps(one) for one in [TABLE, dull, TABLE, dull, TABLE]))
    return file


def test_only_histories_with_a_value_are_asked(path):
    some = histories(path, n=3, seed=0, joined=1, turns=None, distance=2)
    assert {(one.family, len(one.messages), len(one.values)) for one in some} == {("errands", 8, 2)}
    with pytest.raises(DataError, match=r"3 of them hold a value last said 2 turns before"):
        histories(path, n=4, seed=0, joined=1, turns=None, distance=2)


def test_joined_dialogues_keep_their_own_values_in_place(path):
    for one in histories(path, n=2, seed=0, joined=2, turns=None, distance=1):
        texts = [one.messages[v.message].content[v.start : v.end] for v in one.values]
        assert set(texts) == {"Sino", "San Jose", "11:30 am"}
        assert all(one.messages[value.message].role == "assistant" for value in one.values)


def test_a_history_is_cut_after_its_turns(path):
    one = histories(path, n=1, seed=0, joined=1, turns=3, distance=1)[0]
    assert len(one.messages) == 6
    assert {value.message for value in one.values} == {5}


def test_the_same_seed_gives_the_same_histories(path):
    assert [histories(path, n=3, seed=s, joined=1, turns=None, distance=2) for s in (5, 5)] == [
        histories(path, n=3, seed=5, joined=1, turns=None, distance=2)
    ] * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["messages"].pop(), "are not user and assistant in turn"),
        (lambda r: r["messages"][0].update(role="robot"), "are not user and assistant in turn"),
        (lambda r: r["messages"][0].pop("slots"), "lacks slots or content"),
        (lambda r: r["messages"].clear(), "are not user and assistant in turn"),
    ],
)
def test_a_row_of_another_shape_is_named(tmp_path, change, said):
    bad = json.loads(json.dumps(TABLE))
    change(bad)
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(TABLE) + "\n" + json.dumps(bad))
    with pytest.raises(DataError, match=rf"row 2.*{said}"):
        histories(file, n=1, seed=0, joined=1, turns=None, distance=1)


@pytest.mark.skipif(not REAL.is_file(), reason="KVFOLD_DATA names no folder with eval/sgd.dev.jsonl.xz")
def test_real_values_stand_in_their_reply_and_in_no_turn_between():
    for one in histories(REAL, n=200, seed=0, joined=1, turns=None, distance=2):
        for value in one.values:
            text = one.messages[value.message].content[value.start : value.end]
            said = [bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", m.content)) for m in one.messages]
            turn = value.message // 2
            assert any(said[2 * (turn - value.distance) : 2 * (turn - value.distance) + 2])
            assert not any(said[2 * (turn - value.distance) + 2 : value.message])
