"""safety_turns: something is agreed early, tested at the end, and two replies are compared."""

from itertools import pairwise

import pytest
import torch
from strangers import stranger

from kvfold.bench.suites import find
from kvfold.bench.suites.safety_turns import SUITE, SafetyTurns, _tested
from kvfold.chat.template import render
from kvfold.data import Message
from kvfold.errors import SuiteError


def test_what_is_agreed_comes_first_and_both_replies_speak_of_it():
    for sample in SUITE.samples(n=30, seed=0):
        assert [message.role for message in sample.messages][-1] == "user"
        early = " ".join(message.content for message in sample.messages[:4])
        kept, broken = (set(reply.strip(".").split()) for reply in (sample.kept, sample.broken))
        assert kept != broken
        assert any(word in early for word in broken - kept)
        assert len(sample.messages) in (1 + 2 * 7, 1 + 2 * 8)


def test_families_take_turns_and_the_seed_decides():
    samples = SUITE.samples(n=9, seed=3)
    assert [sample.family for sample in samples[:3]] == ["refusal", "secret", "limit"]
    assert samples == SUITE.samples(n=9, seed=3)
    assert samples != SUITE.samples(n=9, seed=4)


def test_the_tokens_are_those_of_the_whole_text():
    subject = stranger()
    for sample in SUITE.samples(n=3, seed=1):
        tested = _tested(subject.tokenizer, sample)
        read = [token for turn in tested.turns for token in turn]
        for reply, tokens in zip((sample.kept, sample.broken), tested.replies, strict=True):
            whole = render(subject.tokenizer, [*sample.messages, Message(role="assistant", content=reply)])
            ids = [*read, *tested.test, *tokens]
            expected = subject.tokenizer(whole, add_special_tokens=False)["input_ids"]
            assert ids == expected[: len(ids)]
            assert subject.tokenizer.decode(tokens).strip() == reply


def test_the_choice_is_that_of_plain_forwards():
    subject = stranger()
    samples = SUITE.samples(n=3, seed=0)
    outcomes = dict(SUITE.ask_each(subject, ["full"], samples))["full"]
    for number, sample in enumerate(samples):
        tested = _tested(subject.tokenizer, sample)
        means = []
        for reply in tested.replies:
            ids = torch.tensor([[token for turn in (*tested.turns, tested.test, reply) for token in turn]])
            with torch.no_grad():
                logits = subject.model(ids).logits[0].log_softmax(dim=-1)
            said = logits[-len(reply) - 1 : -1].gather(1, torch.tensor(reply)[:, None])
            means.append(float(said.mean()))
        assert outcomes[number].metrics["lead"] == pytest.approx(means[0] - means[1], abs=1e-3)
        assert outcomes[number].score == 1


def test_full_is_asked_though_it_is_not_wanted_and_nothing_differs_from_it():
    assert find("safety-turns") is SUITE
    samples = SUITE.samples(n=6, seed=0)
    answered = dict(SUITE.ask_each(stranger(), ["none", "int8"], samples))
    assert set(answered) == {"none", "int8"}
    leads = [[outcome.metrics["lead"] for outcome in by_number.values()] for by_number in answered.values()]
    for none, int8 in pairwise(leads):
        assert none != int8


def test_no_small_talk_is_refused():
    with pytest.raises(SuiteError, match="counts turns"):
        SafetyTurns(between=0)
