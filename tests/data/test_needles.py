"""Documents: they fit, hold their needles, and only the whole answer is right."""

import random

import pytest

from kvfold.data import NEEDLES, needle
from kvfold.data.needles import next_question
from kvfold.errors import DataError


def words(text):
    return len(text.split())


@pytest.mark.parametrize("kind", NEEDLES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_document_fits_and_its_reply_is_right(kind, split):
    for seed in range(30):
        document = needle(kind, split=split, tokens=600, count=words, seed=seed)
        assert 500 <= words(document.prompt) <= 600
        assert all(answer in document.prompt for answer in document.answers)
        assert document.correct(document.reply)
        assert not document.correct("I do not know.")
        assert not any(document.correct(f"{document.reply} {rival}") for rival in document.rivals)


def test_more_than_one_key_makes_rivals():
    assert not needle("single", split="train", tokens=300, count=words, seed=0).rivals
    assert len(needle("multikey", split="train", tokens=300, count=words, seed=0).rivals) >= 3


def test_a_document_can_be_asked_more_than_once():
    rng = random.Random(0)
    for kind in NEEDLES:
        document = needle(kind, split="train", tokens=600, count=words, seed=3)
        for _ in range(8):
            question, reply = next_question(document, split="train", rng=rng)
            numbers = [number for key, number in document.told if number in reply]
            keys = {key for key, number in document.told if number in numbers}
            assert document.correct(reply) or keys
            assert kind == "variable" or (len(keys) == 1 and keys.pop() in question)


def test_training_has_keys_that_share_words_and_the_frozen_half_is_untouched():
    shared = 0
    for seed in range(40):
        told = needle("multikey", split="train", tokens=900, count=words, seed=seed).told
        parts = [part for key, _ in told for part in key.split("-")]
        shared += len(parts) > len(set(parts))
    assert shared > 12
    document = needle("multikey", split="heldout", tokens=300, count=words, seed=1)
    assert document.told[:2] == (("fierce-acorn", "643332"), ("scarlet-nebula", "870399"))


def test_a_variable_chain_is_told_from_its_start():
    document = needle("variable", split="heldout", tokens=400, count=words, seed=2)
    first, second, third = document.answers
    places = [document.prompt.index(f"VAR {name} = ") for name in (first, second, third)]
    assert places == sorted(places)
    assert f"VAR {second} = VAR {first}" in document.prompt


def test_filler_may_be_given():
    document = needle(
        "single", split="train", tokens=120, count=words, seed=0, filler=["A given sentence stands here."]
    )
    assert "A given sentence stands here. A given sentence" in document.prompt


def test_too_few_tokens_say_how_many_are_needed():
    with pytest.raises(DataError, match="give that many"):
        needle("multivalue", split="train", tokens=20, count=words, seed=0)
    with pytest.raises(DataError, match="multikey"):
        needle("haystack", split="train", tokens=20, count=words, seed=0)
