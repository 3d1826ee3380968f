"""What several plans read once is worth exactly what each would have read by itself, for every plan of the registry."""

import pytest
import torch

import plans as registry
from kvfold.bench.ask.asking import ask_each
from kvfold.bench.ask.prompts import Prompt
from kvfold.bench.ask.reader import open_rows
from kvfold.bench.ask.shared import SharedRows, sharers
from kvfold.bench.choices import choose
from kvfold.bench.subject import open_subject
from kvfold.bench.suites import find
from kvfold.data import dialogue
from kvfold.errors import PlanError
from kvfold.hf import passes
from kvfold.open import cache

EVERY = list(dict.fromkeys(str(plan) for plan in (registry.lossy() | registry.lossless()).values()))
TIMES = ("ttft_seconds", "tpot_seconds")
SUITES = {
    "needle": ["tokens=256", "kinds=single,multikey"],
    "fidelity": ["context=96", "continuation=24", "stride=12", "greedy=4"],
}
SOME = ["full", "h2o(keep=0.3)", "kvzip(keep=0.3)", "sentkv(budget=0.3)"]


@pytest.fixture(scope="module")
def tiny():
    return open_subject("tiny")


def prompts(tokenizer, replies=3):
    texts = [" ".join(m.content for m in dialogue("recall", split="train", turns=8, seed=s).messages) for s in (1, 2)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return [
        Prompt(context=tuple(one[:length]), question=tuple(one[length : length + 5]), reply_tokens=replies)
        for one, length in zip(ids, (90, 88), strict=True)  # of like length: rows of one group, one with pads
    ]


def untimed(cost):
    return {name: value for name, value in cost.items() if name not in TIMES}


def gathered(subject, plans, asked):
    found = {plan: {} for plan in plans}
    for plan, answers in ask_each(subject, plans, asked):
        found[plan] |= answers
    return found


def has_what_it_needs(subject, plan):
    """Whether the model's shipped adapters serve a plan; the tiny one measured no losses for kvtc."""
    try:
        cache(subject.model, plan)
    except PlanError:
        return False
    return True


def test_every_plan_answers_from_the_shared_reading_as_from_its_own(tiny):
    asked = prompts(tiny.tokenizer)
    plans = [plan for plan in EVERY if has_what_it_needs(tiny, plan)]
    shared = gathered(tiny, plans, asked)
    for plan in plans:
        alone = gathered(tiny, [plan], asked)[plan]
        for number, one in shared[plan].items():
            assert one.tokens == alone[number].tokens, plan
            assert untimed(one.cost) == untimed(alone[number].cost), plan
            assert one.shared == (plan in sharers(plans)), plan
            assert not alone[number].shared
    assert len(sharers(plans)) > 20
    assert not [plan for plan in EVERY if plan not in plans and "kvtc" not in plan]


@pytest.mark.parametrize("name", [*SUITES, pytest.param("chat", marks=pytest.mark.slow)])
def test_a_suite_scores_the_same_with_and_without_sharing(tiny, name, monkeypatch):
    monkeypatch.setattr("kvfold.bench.suites.needle.REPLY_TOKENS", 12)
    suite = choose(find(name), given=SUITES.get(name, []))
    samples = suite.samples(n=2, seed=0)
    found = {plan: {} for plan in SOME}
    for plan, outcomes in suite.ask_each(tiny, SOME, samples):
        found[plan] |= outcomes
    assert suite.shares_prefill
    for plan in SOME:
        alone = suite.ask(tiny, plan, samples)
        for number, one in enumerate(alone):
            shared = found[plan][number]
            assert (shared.score, shared.metrics, shared.stored_bytes) == (one.score, one.metrics, one.stored_bytes), (
                plan
            )
            assert shared.shared_prefill == (plan in sharers(SOME)), plan


def test_a_text_is_read_once_for_all_that_share(tiny, monkeypatch):
    read = []
    forward = type(tiny.model).forward

    def counting(self, input_ids=None, **given):
        read.append(input_ids.numel())
        return forward(self, input_ids, **given)

    monkeypatch.setattr(type(tiny.model), "forward", counting)
    rows = SharedRows(tiny, SOME, count=1)
    rows.feed([list(range(300, 400))])
    for plan in SOME:
        rows.under(plan)
    assert read == [100, 100], "once for all, and once for the plan that places slots"


def test_forks_go_their_own_ways(tiny):
    rows = SharedRows(tiny, ["full", "snapkv(keep=0.2)"], count=1)
    rows.feed([list(range(300, 400))])
    first, second = rows.under("full"), rows.under("full")
    first.feed([[5, 6, 7]])
    alone = SharedRows(tiny, ["full"], count=1)
    alone.feed([list(range(300, 400))])
    assert second.logits([[9]]).equal(alone.under("full").logits([[9]]))
    assert (first.fed_tokens, second.fed_tokens) == ([103], [101])


def test_sizes_of_kvzip_replay_a_text_once_and_go_on_alone_after_their_fold(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(passes, "replay", lambda *given, of=passes.replay: calls.append(1) or of(*given))
    rows = SharedRows(tiny, ["kvzip(keep=0.3)", "kvzip(keep=0.6)"], count=1)
    text = [prompts(tiny.tokenizer)[0].context]
    rows.feed(text)
    for number, plan in enumerate(("kvzip(keep=0.3)", "kvzip(keep=0.6)")):
        shared, alone = rows.under(plan), open_rows(tiny, plan, count=1)
        alone.feed(text)
        calls.clear()
        shared.fold()
        assert len(calls) == 1 - number  # the first plan's replay is the second's
        alone.fold()
        for more in (text, [text[0][:40]]):
            assert torch.equal(shared.logits(more), alone.logits(more))
            calls.clear()
            shared.fold()
            assert len(calls) == 1  # what is held differs now, and so may what is seen in it
            alone.fold()
    rows.feed(text)
    calls.clear()
    rows.under("kvzip(keep=0.3)").fold()
    assert len(calls) == 1  # of the longer text nothing was replayed
