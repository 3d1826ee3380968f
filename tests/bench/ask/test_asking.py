import dataclasses
import pickle

import pytest
import torch
from strangers import stranger

from kvfold.bench.ask.asking import ask_each, group_by_length, has_sliding_layers, read_once, stop_tokens
from kvfold.bench.ask.audit import AuditedRows
from kvfold.bench.ask.prompts import Prompt
from kvfold.bench.suites import find


def prompts(lengths, *, reply_tokens=6):
    generator = torch.Generator().manual_seed(1)
    return [
        Prompt(
            context=tuple(torch.randint(300, 2000, (length,), generator=generator).tolist()),
            question=tuple(torch.randint(300, 2000, (3 + row,), generator=generator).tolist()),
            reply_tokens=reply_tokens,
        )
        for row, length in enumerate(lengths)
    ]


def ask(subject, plan, asked):
    (answers,) = [found for _, found in gathered(subject, [plan], asked).items()]
    return [answers[number] for number in range(len(asked))]


def gathered(subject, plans, asked):
    found = {plan: {} for plan in plans}
    for plan, answers in ask_each(subject, plans, asked):
        found[plan] |= answers
    return found


@pytest.mark.parametrize("plan", ["full", "snapkv(keep=0.3)", "streaming_llm(keep=0.3) + int8"])
def test_together_prompts_are_answered_as_alone(plan):
    asked = prompts([200, 64, 205, 66, 130])
    together = ask(stranger(), plan, asked)
    alone = [ask(stranger(), plan, [one])[0] for one in asked]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert len({tuple(one.tokens) for one in together}) > 1


def test_long_contexts_are_read_in_pieces_without_a_trace(monkeypatch):
    asked = prompts([700, 690])
    whole = [one.tokens for one in ask(stranger(), "snapkv(keep=0.3)", asked)]
    monkeypatch.setattr("kvfold.bench.ask.asking.PIECE", 100)
    assert [one.tokens for one in ask(stranger(), "snapkv(keep=0.3)", asked)] == whole


def test_each_prompt_has_its_own_length_of_reply():
    one, other = prompts([100, 100])
    answers = ask(stranger(), "full", [dataclasses.replace(one, reply_tokens=2), other])
    assert [len(answer.tokens) for answer in answers] == [2, 6]


def test_the_question_is_not_among_what_was_folded():
    one = prompts([400])[0]
    other = dataclasses.replace(one, question=one.question[::-1])
    first, second = (ask(stranger(), "snapkv(keep=0.2)", [p])[0] for p in (one, other))
    assert first.cost["stored_bytes"] == second.cost["stored_bytes"]
    assert first.tokens != second.tokens
    assert 0.15 < first.cost["stored"] <= 0.2


def test_asking_leaves_the_fold_as_it_was():
    from kvfold.bench.ask.asking import ask_rows

    one = prompts([300])[0]
    rows = read_once(stranger(), ["snapkv(keep=0.2)"], [one.context]).under("snapkv(keep=0.2)")
    rows.fold()
    first, again = (ask_rows(stranger(), rows, [one])[0] for _ in range(2))
    assert first.tokens == again.tokens
    assert rows.fed_tokens == [300]


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [([], []), ([5], [[0]]), ([100, 50, 101, 51, 108], [[1, 3], [0, 2], [4]]), ([640, 680, 681], [[0, 1], [2]])],
)
def test_rows_of_like_length_go_together(lengths, groups):
    assert group_by_length(lengths, alone=False) == groups
    assert group_by_length(lengths, alone=True) == [[row] for group in groups for row in group]


def test_models_with_sliding_layers_are_asked_one_by_one():
    subject = stranger(slides=True)
    assert has_sliding_layers(subject)
    assert not has_sliding_layers(stranger())
    asked = prompts([40, 41])
    assert [one.tokens for one in ask(subject, "full", asked)] == [ask(subject, "full", [p])[0].tokens for p in asked]


def test_every_token_that_ends_a_reply_stops_it(monkeypatch):
    subject = stranger()
    assert subject.tokenizer.eos_token_id in stop_tokens(subject)
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", [7, 9])
    assert stop_tokens(subject) == {subject.tokenizer.eos_token_id, 7, 9}


@pytest.mark.parametrize("name", ["needle", "ruler"])
def test_samples_and_suites_can_be_sent_to_another_process(name):
    suite = find(name)
    samples = suite.samples(n=4, seed=0)
    assert pickle.loads(pickle.dumps((suite, samples))) == (suite, samples)


def test_a_row_that_reads_nothing_may_lie_beside_one_that_does():
    subject = stranger()
    rows = AuditedRows(subject.model, "snapkv(keep=0.5)", rows=2)
    rows.feed([list(range(20, 60)), list(range(30, 70))])
    rows.fold()
    logits = rows.trial([[5, 6, 7], []])
    assert [len(of_row) for of_row in logits] == [3, 0]
