"""Plans and their text: what prints is what parses, and every mistake has an answer in three parts."""

import math
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.encode.dense import Dense
from kvfold.encode.int8 import Int8
from kvfold.errors import BudgetError, PlanError
from kvfold.plan import Plan, members
from kvfold.select.full import Full
from kvfold.select.snapkv import SnapKV

FRACTIONS = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)
COUNTS = st.integers(1, 10**9)
BUDGETS = st.one_of(
    st.fixed_dictionaries({"keep": FRACTIONS}),
    st.fixed_dictionaries({"tokens": COUNTS}),
    st.fixed_dictionaries({"max_bytes": COUNTS}),
)
SCOPES = st.sampled_from([{}, {"scope": "turn"}, {"scope": "history"}])
SPECIAL = {
    "snapkv": st.fixed_dictionaries(
        {}, optional={"window": st.integers(1, 99), "pool": st.sampled_from([1, 3, 7, 15])}
    ),
    "h2o": st.fixed_dictionaries({}, optional={"recent": st.floats(0, 1), "normalise": st.booleans()}),
    "int8": st.fixed_dictionaries({}, optional={"group": st.integers(1, 256)}),
    "int4": st.fixed_dictionaries({}, optional={"group": st.integers(1, 256)}),
}


def takes_budget(kind):
    """Whether a select member needs one of keep, tokens and max_bytes."""
    try:
        kind()
    except PlanError:
        return True
    return False


@st.composite
def plans(draw):
    """Plans of any members of the registry."""
    chosen = {}
    for axis in ("select", "encode", "place"):
        name, kind = draw(st.sampled_from(sorted(members(axis).items())))
        settings = dict(draw(SPECIAL.get(name, st.just({}))))
        if axis == "select" and takes_budget(kind):
            settings |= draw(BUDGETS) | ({} if kind.chooses_jointly else draw(SCOPES))
        chosen[axis] = kind(**settings)
    return Plan(**chosen)


@settings(deadline=None)
@given(plans())
def test_a_plan_is_what_its_text_says(plan):
    assert Plan.parse(str(plan)) == plan


@settings(deadline=None)
@given(plans())
def test_order_and_spaces_of_the_text_do_not_matter(plan):
    terms = str(plan).split(" + ")
    assert Plan.parse("  " + "+".join(reversed(terms)) + " ") == plan


def test_an_axis_that_is_not_named_is_lossless():
    assert Plan.parse("int8(group=16)") == Plan(select=Full(), encode=Int8(group=16))
    assert Plan.parse("snapkv(keep=0.5)").encode == Dense()
    assert str(Plan()) == "full"
    assert Plan.parse("full + dense + device") == Plan()


@pytest.mark.parametrize("axis", ["select", "encode", "place"])
def test_every_member_is_called_as_its_file(axis):
    for name, kind in members(axis).items():
        assert kind.__module__.endswith(f"{axis}.{name}")
        assert all(field.kw_only for field in fields(kind))


def test_the_registry_has_the_members_of_this_version():
    assert {"full", "none", "streaming_llm", "h2o", "snapkv"} <= set(members("select"))
    assert {"dense", "int8", "int4"} <= set(members("encode"))
    assert {"device"} <= set(members("place"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snapvk(keep=0.5)", "near it are .*snapkv"),
        ("utterly_else", "there is no such member"),
        ("snapkv(kep=0.5)", "knows keep, tokens, max_bytes, scope, window, pool"),
        ("snapkv(keep=0.5) + h2o(keep=0.5)", "snapkv and h2o; both say what stays; give one"),
        ("int8 + int4", "both say how a slot is stored"),
        ("full + full", "both say what stays"),
        ("snapkv(0.5)", "write a name with keywords"),
        ("snapkv(keep=x)", "no literal"),
        ("snapkv(keep={[1]: 2})", "no literal"),
        ("snapkv(keep=__import__('os'))", "no literal"),
        ("snapkv(keep=0.5, **{'window': 3})", "write a name with keywords"),
        ("snapkv(keep=0.5, keep=0.6)", "write a name with keywords"),
        ("snapkv(keep=0.5", "cannot be read"),
        ("", "cannot be read"),
        ("snapkv - int8", "no member"),
        ("'snapkv'", "no member"),
        ("snapkv", "give keep=, tokens= or max_bytes="),
        ("full(keep=0.5)", "leave keep=, tokens= and max_bytes= away"),
        ("none(tokens=3)", "leave keep="),
        ("snapkv(keep=0.5, scope='day')", "'history' or 'turn'"),
        ("snapkv(keep=0.5, window=0)", "window=1 or more"),
        ("snapkv(keep=0.5, pool=4)", "odd pool"),
        ("int8(group=0)", "at least one dimension"),
        ("snapkv(keep='half')", "keep"),
        ("snapkv(keep=True)", "keep"),
        ("snapkv(tokens=2.5)", "tokens"),
        ("snapkv(keep=0.5, window='wide')", "window"),
        ("h2o(keep=0.5, recent='all')", "recent"),
        ("h2o(keep=0.5, recent=2.0)", "recent"),
        ("h2o(keep=0.5, normalise=3)", "normalise"),
        ("int4(group=1.5)", "group"),
        ("full(scope=3)", "scope"),
    ],
)
def test_a_text_that_is_no_plan_says_what_to_write(text, says):
    with pytest.raises(PlanError, match=says):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snapkv(keep=0)", "snapkv: keep=0 .* more than 0 and at most 1"),
        ("snapkv(keep=1.5)", "more than 0 and at most 1"),
        ("snapkv(keep=1e999)", "more than 0 and at most 1"),
        ("snapkv(keep=0.5, tokens=10)", "2 kinds .* give exactly one"),
        ("snapkv(tokens=0)", "give at least 1"),
        ("snapkv(max_bytes=-5)", "give at least 1"),
    ],
)
def test_a_budget_that_cannot_be_says_what_to_give(text, says):
    with pytest.raises(BudgetError, match=says):
        Plan.parse(text)


def test_a_very_long_text_is_refused_and_not_a_crash():
    with pytest.raises(PlanError):
        Plan.parse("+".join(["int8"] * 20_000))


def test_nan_is_no_fraction():
    with pytest.raises(BudgetError, match="more than 0"):
        SnapKV(keep=math.nan)


def test_another_budget_keeps_everything_else():
    plan = Plan.parse("snapkv(keep=0.5, window=8, scope='turn') + int8")
    assert str(plan.with_budget(tokens=40)) == "snapkv(tokens=40, scope='turn', window=8) + int8"
    assert plan.keep == 0.5
    assert plan.has_budget
    assert plan.with_scope("history").select.scope == "history"


@pytest.mark.parametrize("text", ["full", "none", "int8"])
def test_a_plan_without_a_budget_cannot_get_another(text):
    plan = Plan.parse(text)
    assert not plan.has_budget
    assert plan.keep is None
    with pytest.raises(BudgetError, match="has none to change"):
        plan.with_budget(keep=0.5)


def test_too_few_tokens_for_the_sinks_says_how_many_are_needed():
    with pytest.raises(
        BudgetError, match=r"tokens=4 was asked for; its 4 slots cannot hold 4 pinned tokens .* give tokens=5"
    ):
        Plan.parse("streaming_llm(tokens=4)").rules(pinned=4, layers=1)
    assert Plan.parse("streaming_llm(tokens=4)").rules(pinned=3, layers=1).pinned == 3


@pytest.mark.parametrize(
    "text", ["sentkv(budget=0.1, every=10000000000000000000)", "snapkv(keep=0.5, window=9999999999999)"]
)
def test_a_whole_number_beyond_all_counts_is_one_line(text):
    with pytest.raises(PlanError, match="it counts from"):
        Plan.parse(text)
