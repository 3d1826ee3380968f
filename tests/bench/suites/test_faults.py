import dataclasses

import pytest
import torch

from fakes import model_of
from kvfold.bench.ask import fault_checks
from kvfold.bench.ask.reader import open_rows
from kvfold.bench.subject import Subject
from kvfold.bench.suites import find
from kvfold.bench.suites.faults import SUITE
from kvfold.errors import CacheError, SuiteError
from kvfold.hf.generate_call import GenerateCall


class Letters:
    """A tokenizer for a small vocabulary: one token a letter."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}


@pytest.fixture(scope="module")
def subject():
    model = model_of("llama")
    return Subject(name="a", model=model, tokenizer=Letters(), fingerprint="a", dtype="float32", device="cpu")


SMALL = dataclasses.replace(SUITE, tokens=60, new=5, pads=40)


def test_the_suite_is_found_and_its_samples_follow_from_the_seed():
    assert find("faults").name == "faults"
    assert SUITE.samples(n=4, seed=1) == SUITE.samples(n=6, seed=1)[:4] != SUITE.samples(n=4, seed=2)
    assert [sample.kind for sample in SUITE.samples(n=3, seed=0)] == ["second_turn", "padding", "second_turn"]


@pytest.mark.parametrize(
    "plan", ["full", "none", "streaming_llm(keep=0.5)", "h2o(keep=0.3)", "snapkv(keep=0.5) + int8"]
)
def test_our_plans_feed_a_turn_once_and_read_a_padded_row_as_alone(subject, plan):
    outcomes = SMALL.ask(subject, plan, SMALL.samples(n=4, seed=0))
    assert [outcome.score for outcome in outcomes] == [1.0] * 4
    assert outcomes[0].metrics == {"fed": 6.0, "fed_expected": 6.0}


def test_a_cache_that_says_how_much_it_stores_instead_of_what_it_saw_is_caught(subject, monkeypatch):
    """The planted lie: the length that transformers is told is that of the stored slots."""
    honest = fault_checks.cache

    def stored_length(model, plan, **settings):
        made = honest(model, plan, **settings)
        layers = len(made.memory.layers) * 2
        short = {"get_seq_length": lambda self, layer=0: self.ledger().slots // layers}
        kind = type("Short", (type(made),), short)
        made.__class__ = kind
        return made

    monkeypatch.setattr(fault_checks, "cache", stored_length)
    (sample,) = SMALL.samples(n=1, seed=0)
    with pytest.raises(CacheError):  # a cache of ours notices by the text, so a lie must silence that too
        SMALL.ask(subject, "streaming_llm(keep=0.5)", [sample])
    monkeypatch.setattr(GenerateCall, "refuse_out_of_turn", lambda *_: None)
    (outcome,) = SMALL.ask(subject, "streaming_llm(keep=0.5)", [sample])
    assert outcome.score == 0.0
    assert outcome.metrics["fed"] > outcome.metrics["fed_expected"]


def test_a_cache_that_keeps_pads_is_caught(subject, monkeypatch):
    """The planted lie: the fold is told that every column is real."""
    honest = fault_checks.cache

    def blind(model, plan, **settings):
        made = honest(model, plan, **settings)
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda *given, attention_mask=None, **named: forward(
                *given, attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **named
            ),
        )  # fmt: skip
        return made

    monkeypatch.setattr(fault_checks, "cache", blind)
    sample = SMALL.samples(n=2, seed=0)[1]
    (outcome,) = SMALL.ask(subject, "streaming_llm(keep=0.5)", [sample])
    assert outcome.score == 0.0


def test_texts_that_are_too_short_are_one_clear_line(subject):
    with pytest.raises(SuiteError, match="give smaller settings"):
        dataclasses.replace(SUITE, tokens=10**6).ask(subject, "full", SUITE.samples(n=1, seed=0))


def test_a_rival_that_nobody_called_is_one_clear_line(subject):
    with pytest.raises(SuiteError, match="give it by --peers"):
        SMALL.ask(subject, "kvpress:SnapKV(keep=0.5)", SMALL.samples(n=1, seed=0))
    with pytest.raises(SuiteError, match="give it by --peers"):
        open_rows(subject, "kvpress:SnapKV(keep=0.5)", count=1)
