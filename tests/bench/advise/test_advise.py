"""Advice for tiny and for two random shapes: what is recommended, why, and what is left out."""

from functools import cache

import pytest
from strangers import stranger

import kvfold
from kvfold.bench.advise import check as checking
from kvfold.bench.advise import texts
from kvfold.bench.advise.advising import advice_of
from kvfold.bench.advise.candidates import CANDIDATES
from kvfold.bench.advise.check_results import Check
from kvfold.bench.advise.forecast import stored_bytes
from kvfold.bench.subject import open_subject
from kvfold.data.passages import passages
from kvfold.errors import BudgetError, DataError, ModelError
from kvfold.hf.model_shape import shape_of
from kvfold.plan import Plan

CONTEXT = 4096
SOME = ("full", "int8(rotate=True)", "int4(rotate=True)", "snapkv(keep=0.5)", "kvzip(keep=0.2) + int4(rotate=True)")
SUBJECTS = {
    "tiny": lambda: open_subject("tiny"),
    "llama": stranger,
    "sliding": lambda: stranger(slides=True),
}


@pytest.fixture
def short(monkeypatch):
    """Passages of a few tokens, so that a check takes a second."""
    monkeypatch.setattr(texts, "FOLDED", 160)
    for module in (texts, checking):
        monkeypatch.setattr(module, "COMPARED", 24)


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    """Text that no check reads by itself."""
    [made] = passages(None, n=1, seed=9, characters=8_000, whole=False)
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("\n".join(message.content for message in made.messages), encoding="utf-8")
    return path


@cache
def opened(name):
    return SUBJECTS[name]()


def shape_for(subject, folder):
    subject.model.config.save_pretrained(folder)
    return shape_of(str(folder))


def measure(subject, file=None, plans=tuple(CANDIDATES)):
    return checking.check(subject, plans, file, minutes=10, tell=lambda line: None)


@pytest.mark.parametrize("text", CANDIDATES)
def test_a_candidate_s_size_is_that_of_its_plan(text):
    plan, size = Plan.parse(text), CANDIDATES[text]
    assert plan.keep == size.keep
    assert getattr(plan.encode, "rate", None) == size.rate
    assert getattr(plan.encode, "bits", None) == size.bits
    assert (plan.select.scope == "turn") == size.once
    assert (type(plan.select).__name__ == "Sonic") == size.scored
    codec = "int8" if getattr(plan.encode, "int8", False) else type(plan.encode).__name__.lower()
    assert {"dense": "raw", "dynakv": "raw", "kvtc": "raw"}.get(codec, codec) == size.codec


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_plan_is_taken_that_loses_more_than_its_bound_elsewhere_where_a_smaller_loss_fits(
    name, short, other_text, tmp_path, monkeypatch
):
    monkeypatch.setattr(checking, "_copied", lambda *_, **__: ({}, "not asked"))
    subject = opened(name)
    shape = shape_for(subject, tmp_path)
    found, elsewhere = measure(subject, None, SOME), measure(subject, other_text, SOME).measured
    full = stored_bytes(CANDIDATES["full"], shape, CONTEXT, dtype="float32")
    for share in (1.0, 0.5, 0.2, 0.1):
        advice = advice_of(shape, CONTEXT, int(share * full), dtype="float32", check=found)
        taken = advice.recommended
        assert taken is not None
        assert taken.fits
        lost = elsewhere[taken.plan].loss.mean
        fitting = [one.plan for one in advice.plans if one.fits and one.measured]
        smaller = [plan for plan in fitting if elsewhere[plan].loss.mean < lost]
        assert lost <= taken.measured.loss.high or not smaller, (share, taken, smaller)


def test_a_plan_without_an_adapter_is_left_out_with_its_reason(short, tmp_path):
    subject = opened("llama")
    found = measure(subject, plans=("int8(rotate=True)", "dynakv(rate=0.2)"))
    assert set(found.measured) == {"int8(rotate=True)"}
    assert "adapter" in found.left_out["dynakv(rate=0.2)"]
    advice = advice_of(shape_for(subject, tmp_path), CONTEXT, 10**9, dtype="float32", check=found)
    assert advice.take == "int8(rotate=True)"
    assert f"dynakv(rate=0.2): {found.left_out['dynakv(rate=0.2)']}" in str(advice)


def test_plans_that_time_does_not_suffice_for_are_left_out(short, monkeypatch):
    monkeypatch.setattr(checking.Clock, "left", 0.0)
    found = measure(opened("llama"), plans=("int8(rotate=True)", "int4(rotate=True)"))
    assert list(found.measured) == ["int8(rotate=True)"]
    assert found.left_out == {"int4(rotate=True)": "the time was up"}


def test_a_check_says_what_the_bench_says_of_a_plan(short):
    found = measure(opened("tiny"), plans=("full", "snapkv(keep=0.2)"))
    full, snapkv = (found.measured[plan] for plan in ("full", "snapkv(keep=0.2)"))
    assert (full.loss.mean, full.loss.high, full.agreement) == (0.0, 0.0, 1.0)
    assert snapkv.loss.low < snapkv.loss.mean < snapkv.loss.high
    assert snapkv.agreement < 1
    assert snapkv.stored_bytes < full.stored_bytes / 2
    assert snapkv.tokens_per_second > 0
    assert snapkv.copied is not None


def test_a_text_too_short_is_one_line(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("Anna lives in Turin.")
    with pytest.raises(DataError, match=r"short\.txt; it has \d+ tokens"):
        measure(opened("tiny"), file)


def test_without_a_check_the_stated_order_decides_and_the_reason_says_so():
    advice = kvfold.advise("tiny", context=4096, memory="3MB", forecast=True)
    assert advice.check is None
    assert advice.take == "int4(rotate=True)"
    assert "stated order" in advice.reason
    assert "not measured" in advice.reason


def test_where_nothing_fits_the_reason_says_what_would():
    advice = kvfold.advise("tiny", context=4096, memory="200kB", forecast=True)
    assert advice.take is None
    assert "give that much memory, or a context of" in advice.reason
    words = advice.reason.split("a context of ")[1]
    tokens = int(words.split()[0].replace(",", ""))
    assert kvfold.advise("tiny", context=tokens, memory="200kB", forecast=True).take


def test_without_a_memory_the_advice_is_about_plans_that_save():
    advice = kvfold.advise("tiny", forecast=True)
    assert advice.take == "int8(rotate=True)"
    assert advice.context == 8192
    assert "the model reads 8,192 tokens at most; the context is that" in advice.notes


def test_with_room_for_everything_nothing_is_lost(short):
    found = measure(opened("tiny"), plans=("full", "int8(rotate=True)"))
    advice = advice_of(shape_of("tiny"), CONTEXT, 10**9, dtype="float32", check=found)
    assert advice.take == "full"
    assert "loses nothing" in advice.reason


def test_a_tie_goes_to_fewer_bytes_and_the_reason_says_that(short):
    measured = measure(opened("tiny"), plans=("int4(rotate=True)",)).measured
    same = dict.fromkeys(("int8(rotate=True)", "int4(rotate=True)"), measured["int4(rotate=True)"])
    found = Check(
        measured=same,
        left_out={},
        adapter_bytes={},
        folded=1,
        compared=1,
        passages=4,
        source="a text",
        copying="not asked",
    )
    advice = advice_of(shape_of("tiny"), CONTEXT, 5 * 10**6, dtype="bfloat16", check=found)
    assert advice.take == "int4(rotate=True)"
    assert "fewest bytes" in advice.reason


@pytest.mark.parametrize("memory", ["much", "0", "-2GB", "2XB", 0])
def test_a_memory_that_is_none_is_one_line(memory):
    with pytest.raises(BudgetError, match="give one such as 200MB or 2GB"):
        kvfold.advise("tiny", memory=memory, forecast=True)


def test_a_dtype_that_no_cache_has_is_one_line():
    with pytest.raises(ModelError, match="give one, or auto"):
        kvfold.advise("tiny", dtype="int3", forecast=True)
