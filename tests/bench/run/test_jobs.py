import pytest

from kvfold.bench.run.jobs import parse_jobs, parse_keeps
from kvfold.errors import BudgetError, PlanError


def test_a_job_knows_whether_its_method_looks_at_queries():
    assert [job.looks_at_queries for job in parse_jobs("full; snapkv(keep=0.5); streaming_llm(keep=0.5)")] == [
        False,
        True,
        False,
    ]


def texts(*arguments, **keywords):
    return [(job.plan, job.keep) for job in parse_jobs(*arguments, **keywords)]


def test_a_size_replaces_the_plans_own_and_a_plan_without_one_runs_once():
    assert texts("full; none; snapkv(keep=0.9, window=16)", keeps=(0.5, 0.2)) == [
        ("full", None),
        ("none", None),
        ("snapkv(keep=0.5, window=16)", 0.5),
        ("snapkv(keep=0.2, window=16)", 0.2),
    ]


def test_without_a_size_a_plan_keeps_its_own():
    assert texts("streaming_llm(keep=0.3); h2o(tokens=64)") == [
        ("streaming_llm(keep=0.3)", 0.3),
        ("h2o(tokens=64)", None),
    ]


@pytest.mark.parametrize("text", ["snapkv", "snapkv()", "int8 + snapkv", "snapkv(window=16) + int8"])
def test_a_plan_that_names_no_size_is_lent_one(text):
    ((plan, keep),) = texts(text, keeps=(0.25,))
    assert keep == 0.25
    assert "snapkv(keep=0.25" in plan
    assert ("int8" in plan) == ("int8" in text)


def test_usual_sizes_are_for_plans_that_name_none():
    assert texts("full; snapkv(keep=0.125) + int8; h2o; streaming_llm(tokens=64)", usual=(0.5, 0.2)) == [
        ("full", None),
        ("snapkv(keep=0.125) + int8", 0.125),
        ("h2o(keep=0.5)", 0.5),
        ("h2o(keep=0.2)", 0.2),
        ("streaming_llm(tokens=64)", None),
    ]


def test_a_plan_that_evicts_runs_in_every_scope_unless_it_names_one():
    both = ("history", "turn")
    assert texts("full; h2o(keep=0.5)", scopes=both) == [
        ("full", None),
        ("h2o(keep=0.5)", 0.5),
        ("h2o(keep=0.5, scope='turn')", 0.5),
    ]
    assert texts("h2o(keep=0.5, scope='turn')", scopes=both) == [("h2o(keep=0.5, scope='turn')", 0.5)]


def test_an_unknown_plan_names_what_is_near():
    with pytest.raises(PlanError, match="snapkv"):
        parse_jobs("snapvk(keep=0.5)", keeps=(0.5,))


@pytest.mark.parametrize("plans", ["", " ; "])
def test_no_plan_at_all_says_what_to_give(plans):
    with pytest.raises(PlanError, match="give one or more"):
        parse_jobs(plans)


@pytest.mark.parametrize("text", ["half", "0", "1.5", "-0.2", "0.5,x"])
def test_a_size_that_is_no_fraction_says_so(text):
    with pytest.raises(BudgetError, match="lies above 0 and up to 1"):
        parse_keeps(text)


def test_sizes_are_read_as_written():
    assert parse_keeps("0.5, 0.2") == (0.5, 0.2)
    assert parse_keeps(None) == ()


def test_a_plan_that_folds_a_segment_once_is_run_in_its_own_scope_alone():
    assert [job.plan for job in parse_jobs("sonic", keeps=[0.2], scopes=("history", "turn"))] == ["sonic(keep=0.2)"]
