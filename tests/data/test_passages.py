import json
import random

import pytest

from kvfold.data.passages import passages
from kvfold.errors import DataError

WORDS = ["river", "stone", "lamp", "green", "over", "under", "walks", "slowly", "bright", "morning"]


def prose(seed, characters):
    rng = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += rng.choice(WORDS) + " "
    return text


def talk(seed, turns):
    rng = random.Random(seed)
    return [
        {"role": role, "content": " ".join(rng.choices(WORDS, k=6))}
        for _ in range(turns)
        for role in ("user", "assistant")
    ]


@pytest.fixture
def write(tmp_path):
    def written(rows, name="set.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    return written


def asked(path, **others):
    return passages(path, **{"n": 4, "seed": 0, "characters": 200, "whole": True} | others)


def test_texts_are_stretches_of_their_length_that_begin_with_a_word(write):
    texts = [prose(seed, 2000) for seed in range(3)]
    found = asked(write([{"text": text} for text in texts]), n=9)
    assert all(len(one.text) == 200 and any(one.text in text for text in texts) for one in found)
    assert all(one.text.split()[0] in WORDS for one in found)
    assert {one.family for one in found} == {"set"}
    assert len({one.text for one in found}) == 9


def test_a_text_file_is_one_text(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(prose(0, 900))
    assert {one.family for one in asked(path)} == {"story"}


def test_talk_of_speakers_is_text(write):
    said = [{"speaker": f"S{number % 2}", "content": "well then " * 6} for number in range(9)]
    [one, *_] = asked(write([{"messages": said}]))
    assert "S1: well then" in one.text
    assert not one.messages


def test_the_same_seed_gives_the_same_passages_and_more_of_them_begin_with_the_same(write):
    for path in (
        write([{"text": prose(0, 5000)}]),
        write([{"messages": talk(s, 3)} for s in range(9)], "d.jsonl"),
        None,
    ):
        assert asked(path, n=5) == asked(path, n=5)
        assert asked(path, n=5)[:3] == asked(path, n=3)
        assert asked(path, n=5) != asked(path, n=5, seed=1)


def test_dialogues_stay_whole_and_end_with_a_reply(write):
    unfinished = [*talk(7, 3), {"role": "user", "content": "and now?"}]
    path = write([{"messages": talk(0, 4)}, {"messages": unfinished}, {"messages": talk(2, 1)}])
    found = asked(path, n=2)
    assert sorted(len(one.messages) for one in found) == [6, 8]
    assert all(one.messages[-1].role == "assistant" for one in found)


def test_dialogues_are_put_one_after_the_other_until_they_are_long_enough(write):
    path = write([{"messages": talk(seed, 2)} for seed in range(9)])
    for one in asked(path, whole=False, characters=500):
        lengths = [len(message.content) for message in one.messages]
        assert sum(lengths) >= 500 > sum(lengths[:-4])


def test_without_a_file_there_are_held_out_dialogues_of_every_family():
    found = asked(None)
    assert [one.family for one in found] == ["recall", "coreference", "arithmetic", "rules"]
    assert all(one.messages[-1].role == "assistant" and 32 <= len(one.messages) <= 48 for one in found)
    longer = asked(None, whole=False, characters=9000)
    assert all(b.messages[: len(a.messages)] == a.messages for a, b in zip(found, longer, strict=True))
    assert all(sum(len(message.content) for message in one.messages) >= 9000 for one in longer)


@pytest.mark.parametrize(
    ("rows", "others", "said"),
    [
        ([{"question": "why?"}], {}, "holds question; text is read from text or messages"),
        ([{"text": "short"}], {}, "its longest has 5; set a shorter context"),
        ([{"messages": talk(0, 3)}], {"n": 2}, "1 of its rows have two turns or more"),
        ([{"messages": talk(0, 3)}], {"n": 1, "whole": False, "characters": 9000}, "all of it is shorter"),
    ],
)
def test_a_file_that_cannot_serve_says_why(write, rows, others, said):
    with pytest.raises(DataError, match=said):
        asked(write(rows), **others)
