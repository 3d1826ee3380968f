import dataclasses

import made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.bench.report import tables
from kvfold.bench.run.record import UNMEASURED


def test_rows_stand_ceiling_first_floor_second_then_by_size():
    (shown,) = tables.tables(made.run())
    assert [row.label for row in shown.rows] == [
        "full",
        "none",
        "snapkv(keep=0.5)",
        "streaming_llm(keep=0.5)",
        "snapkv(keep=0.2)",
    ]


def test_of_two_scopes_the_better_is_shown_and_named():
    (shown,) = tables.tables(made.run())
    plans = [row.record.plan for row in shown.rows]
    assert 'snapkv(keep=0.5, scope="turn")' in plans
    assert 'snapkv(keep=0.2, scope="history")' in plans
    assert len(plans) == 5


@pytest.mark.parametrize(
    "text",
    ['h2o(keep=0.5, scope="turn")', "h2o(scope='turn', keep=0.5)", 'h2o(keep=0.5, scope = "history")'],
)
def test_a_plan_without_its_scope_is_still_a_plan(text):
    assert tables.without_scope(text) == "h2o(keep=0.5)"


def test_a_difference_inside_the_interval_is_printed_as_a_tie():
    (shown,) = tables.tables(made.run())
    words = {row.label: tables.cells(shown, row) for row in shown.rows}
    assert words["full"][6] == ""
    assert words["snapkv(keep=0.5)"][6] == "tie"
    assert words["streaming_llm(keep=0.5)"][6].startswith("-0.400 (")


def test_the_best_of_a_size_is_marked_and_so_is_a_tie_with_it():
    (shown,) = tables.tables([*made.run(), made.record("h2o(keep=0.5)", 0.5, (1.0,) * 17 + (0.0,) * 3)])
    standing = {row.label: row.standing for row in shown.rows}
    assert standing["snapkv(keep=0.5)"] == "best"
    assert standing["h2o(keep=0.5)"] == "tie"
    assert standing["streaming_llm(keep=0.5)"] == ""
    assert standing["full"] == ""


def plan(name, stored, outcomes):
    """A record of a plan without a nominal size."""
    return made.record(name, None, outcomes, stored=stored)


def test_plans_are_compared_by_the_bytes_that_they_hold():
    many, few = (1.0,) * 20, (0.0,) * 18 + (1.0,) * 2
    records = [plan("int8", 0.56, few), plan("kvtc", 0.5, many), plan("int4", 0.3, few), plan("pca", 0.29, many)]
    small = made.record("chunkkv(keep=0.5) + int4", 0.5, few, stored=0.15)
    (shown,) = tables.tables([*records, small])
    assert [(row.label, row.standing) for row in shown.rows] == [
        ("int8", ""),
        ("kvtc", "best"),
        ("int4", ""),
        ("pca", "best"),
        ("chunkkv(keep=0.5) + int4", ""),
    ]


@given(st.lists(st.tuples(st.floats(0.01, 2), st.integers(1, 20)), min_size=1, max_size=12))
def test_nothing_is_the_best_beside_a_better_one_of_its_size(made_up):
    records = [
        plan(f"way{number}", stored, (1.0,) * good + (0.0,) * (20 - good))
        for number, (stored, good) in enumerate(made_up)
    ]
    (shown,) = tables.tables(records)
    for row in shown.rows:
        near = [other for other in shown.rows if _alike(row, other)]
        if row.standing == "best":
            assert all(other.record.score < row.record.score for other in near if other is not row)
    held = [round(row.record.stored, 3) for row in shown.rows]
    assert held == sorted(held, reverse=True)


def _alike(one, other):
    less, more = sorted((one.record.stored, other.record.stored))
    return less >= tables.ALIKE * more


def test_who_forgets_everything_is_neither_the_best_nor_in_a_tie():
    forgets = (0.0,) * 20
    (shown,) = tables.tables([made.record("h2o(keep=0.5)", 0.5, forgets), made.record("first(keep=0.5)", 0.5, forgets)])
    assert [row.standing for row in shown.rows] == ["", ""]


def test_records_on_other_samples_get_a_table_of_their_own():
    assert len(tables.tables([*made.run(), made.record(seed=3)])) == 2


def test_a_floor_that_equals_the_ceiling_is_said():
    (shown,) = tables.tables([made.record(full=0.4, none=0.4, remarks=("no headroom: 0.400 is not below 0.400",))])
    assert shown.warnings[0].startswith("no headroom")
    assert "warning: no headroom" in tables.markdown(shown)


def test_savings_that_are_not_there_are_said():
    (shown,) = tables.tables([made.record(keep=0.2, stored=1.0)])
    assert shown.warnings == ("snapkv(keep=0.5) promises to keep 0.20 and stores 1.000",)


def test_markdown_has_a_line_for_each_row_and_the_shortcut_below():
    (shown,) = tables.tables(made.run())
    text = tables.markdown(shown)
    body = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(body) == 5
    assert all(line.count("|") == len(tables.heads(shown)) + 1 for line in body)
    assert "best guess that does not know which value belongs to whom, same samples: 0.300" in text


def test_where_several_are_equally_good_none_is_the_best():
    (shown,) = tables.tables([made.record("h2o(keep=0.5)"), made.record("snapkv(keep=0.5)"), made.record("full", None)])
    assert [row.standing for row in shown.rows] == ["", "tie", "tie"]


def test_a_plan_of_ours_stands_beside_the_best_rival_of_its_size():
    better, worse = (1.0,) * 20, (0.0,) * 20
    rivals = [
        made.record("kvpress:SnapKV(keep=0.5)", 0.5, (1.0, 0.0) * 10),
        made.record("kvpress:ThinK(keep=0.5)", 0.5, worse),
    ]
    ours = [
        made.record("h2o(keep=0.5)", 0.5, better),
        made.record("h2o(keep=0.2)", 0.2, better),
        made.record("full", None, better),
    ]
    (shown,) = tables.tables([*ours, *rivals])
    column = tables.heads(shown).index(tables.AGAINST_RIVAL)
    words = {row.label: tables.cells(shown, row)[column] for row in shown.rows}
    assert words.pop("h2o(keep=0.5)").startswith("+0.500 (+")
    assert set(words.values()) == {""}


def test_where_no_rival_ran_there_is_no_column_for_one():
    (shown,) = tables.tables(made.run())
    assert tables.AGAINST_RIVAL not in tables.heads(shown)


def test_small_scores_show_more_digits():
    (shown,) = tables.tables([made.record("full", None, (0.0123, 0.0125), full=0.0124)])
    assert tables.cells(shown, shown.rows[0])[4] == "0.01240"


def test_what_else_was_measured_has_a_column_where_some_record_has_it():
    measured = made.record("full", None, metrics={"kl": 0.01234567, "seconds": 3.0}, metric_intervals={"kl": (0.0, 1)})
    (shown,) = tables.tables([measured, made.record("none", None)])
    assert shown.measures == ("kl",)
    column = tables.heads(shown).index("kl")
    assert [tables.cells(shown, row)[column] for row in shown.rows] == [
        "0.01235 (0 to 1)",
        "",
    ]


def test_a_head_may_break_after_an_underscore_and_an_interval_may_not():
    text = tables.markdown(tables.tables([made.record(by_family={"niah_multikey_1": 0.5})])[0])
    assert "| niah_<wbr>multikey_<wbr>1 |" in text
    assert "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}" in text
    assert "|---|---:|---:|" in text


def test_the_long_name_of_a_rival_may_break():
    rival = made.record("transformers:QuantizedCache(backend='fp8')", 0.5)
    text = tables.markdown(tables.tables([rival])[0])
    assert "| <code>transformers:<wbr>QuantizedCache(<wbr>backend='fp8')</code> |" in text


def test_who_saw_the_question_is_said_in_one_line():
    unaware = [made.record("full", None), made.record("kvtc", None), made.record("int8", None)]
    aware = [made.record(f"{name}(keep=0.5)", query_aware=True) for name in ("snapkv", "h2o")]
    mixed = tables.tables([*unaware, *aware])
    assert tables.notes(mixed[0])[0] == "h2o(keep=0.5), snapkv(keep=0.5) saw the question before they folded"
    (seen,) = tables.tables([unaware[0], *aware])
    assert tables.notes(seen)[0] == "every plan saw the question before it folded"
    unseen = tables.tables(unaware)
    assert tables.notes(unseen[0])[0] == tables.UNSEEN
    assert tables.UNSEEN not in tables.notes(unseen[0], is_alone=False)
    assert tables.seen_above(unseen) == "No plan saw the question before it folded."
    assert tables.seen_above([*unseen, *mixed]).startswith("Where a table does not say otherwise, no plan")


def test_plans_that_fail_alike_are_one_line():
    def failed(keep):
        rival = made.record(f"a:Way(keep={keep})", keep, (0.0,) * 20)
        return dataclasses.replace(rival, failure="ValueError: no keys", **UNMEASURED)

    (shown,) = tables.tables([*made.run(), failed(0.5), failed(0.2)])
    assert "a:Way(keep=0.5), a:Way(keep=0.2) failed: ValueError: no keys" in tables.notes(shown)
    assert [row.standing for row in shown.rows][-2:] == ["failed", "failed"]


def test_words_of_others_end_no_cell_and_reach_no_terminal():
    hostile = "full|<img src=x>\x1b[2J\nnew"
    (shown,) = tables.tables([made.record("full", 1.0), made.record(hostile, 0.5, remarks=(hostile,))])
    text = tables.markdown(shown)
    assert not set(text) & {"\x1b", "\r"}
    assert "<img" not in text
    assert r"full\|&lt;img src=x>\x1b[2J\nnew" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1
