"""Self-study: the passage is folded before the model's own answers, which come again from the same random state."""

import random

import pytest

from kvfold.errors import DataError
from kvfold.hf.load import load
from kvfold.train.sonic.study import PROMPTS, Study
from kvfold.train.sonic.talks import Mix, Talks

PASSAGE = "Anna has a red boat and Peter has a green one. They meet at the harbour on Monday."


def drawn(seed):
    model, tokenizer = load("tiny")
    study = Study(model, tokenizer, reply_tokens=8)
    return tokenizer, study.draw(random.Random(seed), PASSAGE, questions=2, weight=0.5)


def test_the_passage_is_folded_and_the_answers_count():
    tokenizer, talk = drawn(3)
    told, asked = tokenizer.decode(talk.ids[: talk.ends[0]]), tokenizer.decode(talk.ids[talk.ends[0] :])
    assert PASSAGE in told
    assert sum(prompt in asked for prompt in PROMPTS) == 2
    assert set(talk.weights) == {0.0, 0.5}
    assert not any(talk.weights[: talk.ends[0]])


def test_it_is_the_same_from_the_same_random_state():
    assert drawn(5)[1].ids == drawn(5)[1].ids


def test_without_text_to_ask_about_it_is_refused():
    with pytest.raises(DataError, match="give --data"):
        Talks(load("tiny")[1], Mix(study=0.2), None)
