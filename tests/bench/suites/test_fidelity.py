import dataclasses
import os
from itertools import accumulate
from math import exp
from pathlib import Path

import pytest
from strangers import stranger

from kvfold.bench.choices import choose
from kvfold.bench.suites import find
from kvfold.bench.suites.fidelity import SUITE, FidelitySuite
from kvfold.data import dialogue
from kvfold.data.passages import Passage
from kvfold.errors import DataError, SuiteError

REAL = Path(os.environ.get("KVFOLD_DATA", "/nowhere")) / "eval"
PLANS = ["streaming_llm(keep=0.3)", "snapkv(keep=0.3) + int8", "h2o(keep=0.3)", "none"]
SHORT = FidelitySuite(context=40, continuation=50, stride=16, greedy=8)
METRICS = {"kl", "top1", "perplexity_ratio", "divergence_tokens"}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A long text in a file."""
    path = tmp_path_factory.mktemp("data") / "book.txt"
    told = [m.content for seed in range(40) for m in dialogue("recall", split="train", turns=16, seed=seed).messages]
    path.write_text("\n".join(told))
    return path


def measure(suite, plan, n=3, subject=None):
    return suite.ask(subject or stranger(), plan, suite.samples(n=n, seed=0))


def test_the_suite_is_found_by_its_name():
    assert find("fidelity") is SUITE


@pytest.mark.parametrize("form", ["text", "dialogue"])
def test_the_full_cache_is_faithful_to_itself_and_no_history_is_not(book, form):
    suite = choose(SHORT, data=book) if form == "text" else dataclasses.replace(SHORT, context=None)
    full, none = measure(suite, "full", n=2), measure(suite, "none", n=2)
    assert suite.metrics(full) == {"kl": 0.0, "top1": 1.0, "perplexity_ratio": 1.0, "divergence_tokens": 8.0}
    lost = suite.metrics(none)
    assert set(lost) == METRICS
    assert lost["kl"] > 0.1
    assert lost["top1"] < 0.9
    assert [one.score for one in none] == [one.metrics["top1"] for one in none]
    assert sum(one.stored for one in none) < 0.5


def test_the_ratio_of_perplexities_is_that_of_all_tokens_and_no_mean_of_ratios(book):
    one = measure(choose(SHORT, data=book), "full", n=1)[0]
    some = [
        dataclasses.replace(one, metrics={**one.metrics, "likelihood": own, "full_likelihood": full, "tokens": tokens})
        for own, full, tokens in ((-30.0, -20.0, 10.0), (-90.0, -90.0, 90.0))
    ]
    assert SUITE.metrics(some)["perplexity_ratio"] == pytest.approx(exp(10 / 100))


def test_a_text_folds_after_its_context_and_by_its_stride(book):
    suite = choose(SHORT, data=book)
    tokenizer = stranger().tokenizer
    sample = suite.samples(n=1, seed=0)[0]
    chunked = suite.chunks(tokenizer, sample)
    assert [len(chunk) for chunk in chunked.context] == [40]
    assert [len(chunk) for chunk in chunked.scored] == [16, 16, 16, 2]
    tokens = tokenizer(sample.text)["input_ids"][:91]
    assert [t for chunk in (*chunked.context, *chunked.scored) for t in chunk] == tokens[:90]
    assert [t for chunk in chunked.following for t in chunk] == tokens[41:91]


def test_a_dialogue_folds_after_every_turn_and_is_compared_from_its_middle():
    suite = FidelitySuite()
    sample = suite.samples(n=1, seed=0)[0]
    chunked = suite.chunks(stranger().tokenizer, sample)
    assert (len(chunked.context), len(chunked.scored)) == (8, 8)
    ends = [stranger().tokenizer.decode(chunk, skip_special_tokens=False) for chunk in chunked.context]
    assert all(text.endswith("<|end|>") and text.count("<|user|>") == 1 for text in ends)
    assert [len(chunk) for chunk in chunked.scored] == [len(chunk) for chunk in chunked.following]
    assert chunked.scored[0][1:] + chunked.scored[1][:1] == chunked.following[0]


def test_a_context_makes_one_long_text_of_dialogues():
    sample = SHORT.samples(n=1, seed=0)[0]
    chunked = SHORT.chunks(stranger().tokenizer, sample)
    assert [len(chunk) for chunk in chunked.context] == [40]
    assert list(accumulate(len(chunk) for chunk in chunked.scored))[-1] == 50


@pytest.mark.parametrize("plan", PLANS)
def test_dialogues_of_different_length_are_measured_together_as_alone(plan):
    suite = FidelitySuite(stride=16, greedy=4)
    samples = [
        Passage(family=one.family, messages=one.messages[:length])
        for one, length in zip(suite.samples(n=4, seed=0), (4, 12, 6, 8), strict=True)
    ]
    for sample, together in zip(samples, suite.ask(stranger(), plan, samples), strict=True):
        alone = suite.ask(stranger(), plan, [sample])[0]
        assert together.metrics == pytest.approx(alone.metrics, abs=1e-4)
        assert together.family == alone.family


def test_models_with_sliding_layers_and_without_a_template_are_measured_too(book):
    for subject, data in ((stranger(slides=True), book), (stranger(chats=False), None)):
        suite = choose(SHORT, data=data)
        assert suite.metrics(measure(suite, "full", n=2, subject=subject))["kl"] == 0.0
        assert suite.metrics(measure(suite, "none", n=2, subject=subject))["kl"] > 0.0


def test_the_same_seed_gives_the_same_outcomes_apart_from_times(book):
    suite = choose(SHORT, data=book)
    still = [
        [dataclasses.replace(one, ttft_seconds=0.0, tpot_seconds=0.0) for one in measure(suite, "h2o(keep=0.3)")]
        for _ in range(2)
    ]
    assert still[0] == still[1]


def test_what_is_out_of_range_is_said(tmp_path):
    with pytest.raises(SuiteError, match="stride=0 was given"):
        choose(SUITE, given=["stride=0"])
    with pytest.raises(SuiteError, match="the stride is 16; give at most that"):
        choose(SUITE, given=["stride=16", "greedy=17"])
    path = tmp_path / "short.txt"
    path.write_text("a few words")
    with pytest.raises(DataError, match="set a shorter context or continuation"):
        choose(SUITE, data=path).samples(n=1, seed=0)
    with pytest.raises(SuiteError, match=r"this tokenizer makes \d of 6152 characters; set a shorter context"):
        SUITE.chunks(stranger().tokenizer, Passage(family="x", text="a few words"))


@pytest.mark.skipif(not REAL.is_dir(), reason="KVFOLD_DATA names no folder with eval/")
def test_real_texts_and_dialogues_can_be_read():
    for name in ("novels", "qmsum.val", "fairytaleqa.val", "sgd.dev"):
        suite = choose(SHORT, data=REAL / f"{name}.jsonl.xz")
        assert set(suite.metrics(measure(suite, "streaming_llm(keep=0.3)", n=2))) == METRICS
