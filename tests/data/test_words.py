"""The two halves of the vocabulary share nothing."""

import random

from kvfold.data import chitchat
from kvfold.data.arithmetic import CHANGES, DIFFERENCE_ASKS, PRICE_ASKS, SUM_ASKS
from kvfold.data.arithmetic import TELLS as PRICE_TELLS
from kvfold.data.coreference import (
    INTRODUCTIONS,
    LIST_ASKS,
    LIST_CHANGES,
    LISTS,
    PLACE_ASKS,
    PRONOUN_ASKS,
    RELATIVE_ASKS,
)
from kvfold.data.frames import ASK_OPENERS, TELL_OPENERS
from kvfold.data.recall import ASKS, TELLS
from kvfold.data.recall import CHANGES as FACT_CHANGES
from kvfold.data.rules import STYLES, TOPIC_ASKS, WORD_ASKS, WORDS
from kvfold.data.words import _HELDOUT, _TRAIN, Words, listed, split_of


def test_real_words_of_the_two_halves_are_disjoint():
    trained = {word.lower() for kind in _TRAIN for word in listed(kind, "train")}
    heldout = {word.lower() for kind in _HELDOUT for word in listed(kind, "heldout")}
    assert set(_TRAIN) == set(_HELDOUT)
    assert not trained & heldout


def test_made_up_words_belong_to_the_half_that_draws_them():
    rng = random.Random(1)
    for split in ("train", "heldout"):
        drawn = {Words(split=split).pseudo(rng) for _ in range(300)}
        assert len(drawn) > 250
        assert {split_of(word) for word in drawn} == {split}


def test_templates_of_the_two_halves_are_disjoint():
    frames = (TELLS, ASKS, PRICE_TELLS, CHANGES, PRICE_ASKS, SUM_ASKS, DIFFERENCE_ASKS, INTRODUCTIONS, RELATIVE_ASKS)
    frames += (PRONOUN_ASKS, LISTS, LIST_CHANGES, LIST_ASKS, PLACE_ASKS, TOPIC_ASKS, WORD_ASKS)
    for halves in frames:
        assert not set(halves["train"]) & set(halves["heldout"])
    for table in (STYLES, WORDS):
        for how, trained in table["train"].items():
            assert not set(trained) & set(table["heldout"][how])
    for halves in frames:
        made = {opener + text for text in halves["train"] for opener in TELL_OPENERS + ASK_OPENERS}
        made |= {
            opener + text[0].lower() + text[1:] for text in halves["train"] for opener in TELL_OPENERS + ASK_OPENERS
        }
        assert not made & set(halves["heldout"])
    assert not set(chitchat.templates("train")) & set(chitchat.templates("heldout"))
    assert not (set(FACT_CHANGES["train"]) - {""}) & set(FACT_CHANGES["heldout"])


def test_distinct_draws_share_no_word():
    rng, words = random.Random(2), Words(split="train")
    values = words.distinct(lambda: words.value(rng, "city"), 12)
    parts = [part.lower() for value in values for part in value.split()[-1:]]
    assert len(set(parts)) == 12
