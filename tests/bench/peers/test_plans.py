import pytest

from kvfold.bench.peers import plans
from kvfold.bench.peers.catalog import PEERS
from kvfold.bench.run.jobs import parse_rivals
from kvfold.errors import BudgetError, SuiteError
from kvfold.plan import members


@pytest.mark.parametrize(
    "text",
    [
        "kvpress:SnapKV(keep=0.5)",
        "kvpress:SnapKV(keep=0.5, window_size=32)",
        "transformers:DynamicCache",
        "transformers:QuantizedCache(backend='fp8', nbits=4)",
    ],
)
def test_a_rivals_text_prints_as_the_text_that_builds_it(text):
    assert str(plans.parse(text)) == text


def test_a_rival_is_told_from_a_plan_of_ours_by_its_colon():
    assert plans.is_rival("kvpress:SnapKV(keep=0.5)")
    assert not plans.is_rival('sentkv(budget=0.1, tier="disk:/tmp")')
    assert not plans.is_rival(None)
    assert not [name for axis in ("select", "encode", "place") for name in members(axis) if name in PEERS]


def test_sizes_stand_in_place_of_a_rivals_own_and_leave_unsized_ones_alone():
    found = plans.parse_all("kvpress:KVzip(keep=0.9); transformers:DynamicCache;", keeps=(0.5, 0.2))
    assert [str(plan) for plan in found] == ["kvpress:KVzip(keep=0.5)", "kvpress:KVzip(keep=0.2)",
                                             "transformers:DynamicCache"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("kvpres:SnapKV(keep=0.5)", SuiteError, "with one of kvpress"),
        ("snapkv(keep=0.5)", SuiteError, "none that is known"),
        ("kvpress:SnapKW(keep=0.5)", SuiteError, "near it: SnapKV"),
        ("kvpress:SnapKV(0.5)", SuiteError, "cannot be read"),
        ("kvpress:SnapKV(keep=f())", SuiteError, "cannot be read"),
        ("kvpress:SnapKV(**{'keep': 0.5})", SuiteError, "cannot be read"),
        ("kvpress:SnapKV(keep=0.5, keep=0.2)", SuiteError, "cannot be read"),
        ("kvpress:SnapKV(keep=2)", BudgetError, "above 0 and up to 1"),
        ("kvpress:SnapKV", BudgetError, "without a size"),
        ("transformers:DynamicCache(keep=0.5)", SuiteError, "no size to choose"),
    ],
)
def test_a_wrong_text_is_one_clear_line(text, error, says):
    with pytest.raises(error, match=says.replace("(", r"\(")) as caught:
        plans.parse_all(text)
    assert "\n" not in str(caught.value)


def test_a_rival_without_its_environment_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setenv("KVFOLD_PEERS_PYTHON", str(tmp_path / "python"))
    with pytest.raises(SuiteError, match="run `make peers`"):
        parse_rivals("kvpress:SnapKV(keep=0.5)")


def test_jobs_of_rivals_know_their_size_and_whether_they_look_at_queries(monkeypatch):
    monkeypatch.setenv("KVFOLD_PEERS_PYTHON", __file__)  # any file that is there: nothing is started
    snap, stream, stock = parse_rivals("kvpress:SnapKV; kvpress:StreamingLLM; transformers:DynamicCache", keeps=(0.5,))
    assert (snap.plan, snap.keep, snap.looks_at_queries) == ("kvpress:SnapKV(keep=0.5)", 0.5, True)
    assert not stream.looks_at_queries
    assert (stock.keep, stock.looks_at_queries) == (None, False)
