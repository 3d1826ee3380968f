"""The facts suite: one fold serves all questions of a document, answers are found, agreement is with the full cache."""

import pytest
from strangers import stranger

from kvfold.bench.choices import choose
from kvfold.bench.suites import facts
from kvfold.data.facts import document
from kvfold.errors import DataError, SuiteError


def words(text):
    return len(text.split())


def suite():
    return choose(facts.SUITE, given=["tokens=400", "questions=2"])


def test_every_fact_stands_once_in_the_document_and_is_asked_for_by_its_key():
    made = document(tokens=400, facts=4, count=words, seed=3)
    assert words(made.text) <= 400
    assert len({fact.answer for fact in made.facts}) == 4
    for fact in made.facts:
        key = fact.question.split(" for ")[1].split(" mentioned")[0]
        assert made.text.count(f"One of the special magic numbers for {key} is: {fact.answer}.") == 1
    assert document(tokens=400, facts=4, count=words, seed=3) == made
    assert document(tokens=400, facts=4, count=words, seed=4) != made


def test_facts_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="give more tokens"):
        document(tokens=20, facts=4, count=words, seed=0)
    with pytest.raises(SuiteError, match="nothing to ask"):
        choose(facts.SUITE, given=["questions=0"])


def test_a_document_is_read_once_for_all_plans_and_questions(monkeypatch):
    read, given = [], facts.read_once

    def watching(subject, plans, contexts):
        read.append(list(plans))
        return given(subject, plans, contexts)

    monkeypatch.setattr(facts, "read_once", watching)
    samples = suite().samples(n=2, seed=0)
    found = list(suite().ask_each(stranger(), ["full", "snapkv(keep=0.3)"], samples))
    assert len(read) == 2
    assert [plan for plan, _ in found] == ["full", "snapkv(keep=0.3)"] * 2


def test_agreement_is_with_the_replies_of_the_full_cache():
    samples = suite().samples(n=2, seed=1)
    outcomes = dict.fromkeys(("full", "none"), 0.0)
    for plan in outcomes:
        found = suite().ask(stranger(), plan, samples)
        outcomes[plan] = sum(one.metrics["agreement"] for one in found) / len(found)
        assert all(one.score == 0.0 for one in found)  # the stranger knows nothing
    assert outcomes["full"] == 1.0
    assert outcomes["none"] < 1.0


def test_a_reply_that_holds_the_answer_counts(monkeypatch):
    (seed,) = suite().samples(n=1, seed=0)
    made = suite().document(stranger().tokenizer, seed)
    monkeypatch.setattr(facts, "reply", lambda tokenizer, tokens: f"It is {made.facts[0].answer}.")
    (outcome,) = suite().ask(stranger(), "full", [seed])
    assert outcome.score == 0.5


def test_an_exchange_has_a_reply_under_each_plan():
    question, said = suite().exchange(stranger(), ["full", "none"], 0)
    assert question.startswith("What is the special magic number for ")
    assert list(said) == ["full", "none"]
