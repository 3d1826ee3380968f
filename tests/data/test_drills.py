"""Drills: every key asked once, sums that are right, copies that can be known."""

import re
from itertools import pairwise

import pytest

from kvfold.data.drills import DRILLS, copies, drill


@pytest.mark.parametrize("kind", DRILLS)
def test_drills_are_reproducible_and_score_their_replies(kind):
    keys = 50 if kind == "sums" else 4
    messages = drill(kind, keys=keys, seed=3)
    assert messages == drill(kind, keys=keys, seed=3)
    assert sum(message.weight == 1 for message in messages) >= (1 if kind == "sums" else 2)


def test_a_people_drill_asks_every_key_once_with_its_last_value():
    for seed in range(40):
        telling, _, *rest = drill("people", keys=4, seed=seed)
        replies = [message.content for message in rest if message.role == "assistant"]
        assert len(set(replies)) == 4
        for reply in replies:
            name, value = re.fullmatch(r"(\w+)'s \w+ is (.+)\.", reply).groups()
            last = [part for part in re.split(r"(?<=\.) ", telling.content) if name in part][-1]
            assert re.search(rf" {value}[.,]", last)


def test_sums_are_right():
    for seed in range(40):
        for message in drill("sums", keys=100, seed=seed):
            for sum_, parts, result in re.findall(r"([\d +-]+) = ([\d +-]+) = (\d+)", message.content):
                assert value(sum_) == value(parts) == int(result)


def value(text):
    """What "36 + 47" or "40 - 4" comes to."""
    left, sign, right = text.split()
    return int(left) + (int(right) if sign == "+" else -int(right))


def test_scored_copies_were_seen_before_after_the_same_key():
    for seed in range(20):
        ids, weights = copies(ids=range(6, 500), length=128, seed=seed)
        assert len(ids) == len(weights) == 128
        assert 0.1 < sum(weights) / 128 < 0.9
        for at, weight in enumerate(weights):
            if weight:
                assert (ids[at - 1], ids[at]) in set(pairwise(ids[:at]))
