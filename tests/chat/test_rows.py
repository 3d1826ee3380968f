"""Rows: many conversations side by side are what each would be alone."""

import random

import pytest
import torch

from kvfold.chat.rows import Rows
from kvfold.errors import CacheError, DataError, ModelError

PLANS = ["full", "none", "streaming_llm(keep=0.5)", "h2o(keep=0.4) + int8", "snapkv(keep=0.5)", None]


def words(rng, count):
    return [rng.randrange(6, 300) for _ in range(count)]


def history(rng, *, rows, turns=4):
    """Ragged turns; one row says nothing in one of them."""
    told = [[words(rng, rng.randrange(3, 12)) for _ in range(rows)] for _ in range(turns)]
    told[2][0] = []
    return told


def told(model, plan, turns):
    rows = Rows(model, plan, rows=len(turns[0]))
    for turn in turns:
        rows.feed(turn)
        rows.fold()
    return rows


@pytest.mark.parametrize("plan", PLANS)
def test_ragged_rows_answer_as_each_would_alone(model, plan):
    rng = random.Random(1)
    turns = history(rng, rows=3)
    questions = [words(rng, 5), words(rng, 2), words(rng, 7)]
    together = told(model, plan, turns)
    answers = together.answer(questions, max_new_tokens=8, stop={9})
    logits = together.logits(questions)
    for row, question in enumerate(questions):
        alone = told(model, plan, [[turn[row]] for turn in turns])
        assert alone.answer([question], max_new_tokens=8, stop={9}) == [answers[row]]
        torch.testing.assert_close(alone.logits([question])[0], logits[row], atol=1e-5, rtol=1e-5)
        assert alone.fed_tokens == [together.fed_tokens[row]]


def test_full_equals_the_stock_cache_and_one_plain_forward(model):
    rng = random.Random(2)
    turns, question = [[words(rng, 9)], [words(rng, 7)]], words(rng, 5)
    whole = torch.tensor([turns[0][0] + turns[1][0] + question])
    with torch.no_grad():
        plain = model(whole).logits[0, -1]
    for plan in ("full", None):
        torch.testing.assert_close(told(model, plan, turns).logits([question])[0], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_reading_says_what_follows_every_token_of_ragged_rows(model, plan):
    rng = random.Random(7)
    turns, chunks = history(rng, rows=3), [words(rng, 5), [], words(rng, 2)]
    expected = told(model, plan, turns).read(chunks)
    assert [each.shape for each in expected] == [(5, 300), (0, 300), (2, 300)]
    for row, chunk in enumerate(chunks):
        alone = told(model, plan, [[turn[row]] for turn in turns])
        for column, token in enumerate(chunk):
            torch.testing.assert_close(alone.logits([[token]])[0], expected[row][column], atol=1e-5, rtol=1e-5)


def test_nothing_folds_before_it_is_told_to(model):
    rng = random.Random(8)
    rows = Rows(model, "streaming_llm(keep=0.2)", rows=1)
    for count in (40, 70, 70):  # past the end of a first forward, and past a stride
        rows.feed([words(rng, count)])
    ledger = rows.ledger()
    assert ledger is not None
    assert ledger.attended == 1.0
    rows.fold()
    folded = rows.ledger()
    assert folded is not None
    assert folded.attended <= 0.2


@pytest.mark.parametrize("plan", ["h2o(keep=0.5)", "snapkv(keep=0.5)", None])
def test_an_answer_leaves_the_rows_as_they_were(model, plan):
    rng = random.Random(3)
    rows = told(model, plan, history(rng, rows=2))
    question, ledger, fed = [words(rng, 4), words(rng, 6)], rows.ledger(), list(rows.fed_tokens)
    first = rows.answer(question, max_new_tokens=6)
    assert rows.answer(question, max_new_tokens=6) == first
    assert rows.ledger() == ledger
    assert rows.fed_tokens == fed
    assert rows.pace is not None
    assert rows.pace.steps == 5


def test_the_stop_token_ends_a_row_and_is_left_out(model):
    rng = random.Random(4)
    rows, questions = told(model, "full", history(rng, rows=2)), [words(rng, 4), words(rng, 4)]
    free = rows.answer(questions, max_new_tokens=10)
    assert all(len(answer) == 10 for answer in free)
    stopped = rows.answer(questions, max_new_tokens=10, stop={free[0][3]})
    assert stopped[0] == free[0][: free[0].index(free[0][3])]


def test_only_new_tokens_are_fed_however_often_the_history_was_folded(model):
    rng, widths = random.Random(5), []
    hook = model.register_forward_pre_hook(
        lambda _, positional, named: widths.append(positional[0].shape[1]), with_kwargs=True
    )
    turns = history(rng, rows=2, turns=6)
    told(model, "streaming_llm(keep=0.3)", turns)
    hook.remove()
    assert widths == [max(len(chunk) for chunk in turn) for turn in turns]


def test_the_ledger_counts_real_tokens_and_meets_the_budget(model):
    rng = random.Random(6)
    rows = Rows(model, "streaming_llm(keep=0.5)", rows=3)
    for _ in range(8):
        rows.feed([words(rng, rng.randrange(10, 30)) for _ in range(3)])
        rows.fold()
    ledger = rows.ledger()
    assert ledger is not None
    assert ledger.seen == sum(rows.fed_tokens)
    assert 0.44 <= ledger.stored <= 0.5


def test_what_rows_cannot_do_is_said_before_anything_is_fed(make_model):
    model = make_model(positions=32)
    rows = Rows(model, "full", rows=2)
    with pytest.raises(DataError, match="1 chunks were given; there are 2 rows"):
        rows.feed([[7]])
    with pytest.raises(DataError, match="row 1 was given an empty prompt"):
        rows.answer([[7], []], max_new_tokens=2)
    with pytest.raises(DataError, match="chunks without a token"):
        rows.read([[], []])
    with pytest.raises(ModelError, match="a row of 33 tokens"):
        rows.feed([[7] * 33, [7]])
    rows.feed([[7] * 30, [7]])
    with pytest.raises(ModelError, match="32 positions"):
        rows.answer([[7], [7]], max_new_tokens=3)
    assert len(rows.answer([[7], [7]], max_new_tokens=2)[0]) == 2


def test_sliding_windows_refuse_rows_of_different_length(make_model):
    rows = Rows(make_model(family="gemma3"), "streaming_llm(keep=0.5)", rows=2)
    rows.feed([[7, 8, 9], [9, 8, 7]])
    with pytest.raises(CacheError, match="run such rows one by one"):
        rows.feed([[7], [8, 9]])
