import dataclasses

import made
import pytest

from kvfold.bench.report.overview import overview
from kvfold.bench.report.tables import tables, unbroken
from kvfold.bench.run.record import UNMEASURED
from kvfold.errors import FileError

TWENTY = (1.0, 0.0) * 10


def of_two_suites():
    other = [dataclasses.replace(one, suite="needle", stored=one.stored + 0.02, shortcut=None) for one in made.run()]
    return [*made.run(), *other]


def lines(records) -> dict[str, list[str]]:
    """The cells of each row by its plan."""
    rows = [line[2:-2].split(" | ") for line in overview(tables(records)).splitlines() if line.startswith("| ")]
    return {row[0].strip("`*"): row[1:] for row in rows}


def test_a_plan_is_a_row_and_a_suite_a_column():
    found = lines(of_two_suites())
    assert found["plan"] == ["stored", "resident", "attended", "chat", "needle"]
    assert list(found)[1:4] == ["full", "none", "snapkv(keep=0.5)"]
    assert all(len(row) == 5 for row in found.values())


def test_fractions_that_differ_are_ranges_and_others_are_not():
    row = lines(of_two_suites())["snapkv(keep=0.5)"]
    assert row[:2] == [unbroken("0.50 to 0.52"), "0.50"]


def test_scores_have_intervals_and_marks():
    found = lines(of_two_suites())
    assert found["full"][3].startswith("0.90 (")
    assert found["snapkv(keep=0.5)"][3].startswith("**0.90** (")
    assert found["snapkv(keep=0.5)"][3].endswith(" =")
    assert found["streaming_llm(keep=0.5)"][3].startswith("0.50 (")


def test_nothing_is_bold_that_is_no_better_than_the_floor():
    nothing = [made.record(plan, 0.5, (0.0,) * 20) for plan in ("h2o(keep=0.5)", "snapkv(keep=0.5)")]
    assert "**" not in lines(nothing)["h2o(keep=0.5)"][3]


def test_the_shortcut_is_a_row_and_an_empty_cell_where_a_suite_has_none():
    assert lines(of_two_suites())["best shortcut"][3:] == ["0.30", ""]


def test_a_plan_that_was_not_run_on_a_suite_leaves_its_cell_empty():
    only = dataclasses.replace(made.record("h2o(keep=0.5)", 0.5, TWENTY), suite="needle")
    assert lines([*of_two_suites(), only])["h2o(keep=0.5)"][3] == ""


def test_a_rival_that_fails_is_a_row_and_a_note_that_says_how():
    failed = dataclasses.replace(
        made.record("kvpress:KVzip(keep=0.5)", 0.5, TWENTY), failure="ValueError: no keys", **UNMEASURED
    )
    text = overview(tables([*made.run(), failed]))
    assert "| `kvpress:KVzip(keep=0.5)` |  |  |  | failed |" in text
    assert "- failed on chat, `kvpress:KVzip`: ValueError: no keys" in text


def test_what_a_rival_claims_stands_beside_what_it_stores():
    rival = made.record("kvpress:ThinK(keep=0.5)", 0.5, TWENTY, stored=1.0, claimed=0.75)
    assert lines([*made.run(), rival])["kvpress:ThinK(keep=0.5)"][0] == "1.00 (claims 0.75)"


def test_ours_stand_before_rivals_of_the_same_size():
    rival = made.record("a:Way(keep=0.5)", 0.5, TWENTY)
    plans = list(lines([*made.run(), rival]))
    assert plans.index("streaming_llm(keep=0.5)") < plans.index("a:Way(keep=0.5)") < plans.index("snapkv(keep=0.2)")


def test_two_runs_of_one_suite_are_no_overview():
    with pytest.raises(FileError, match="chat was run with several samples"):
        overview(tables([*made.run(), made.record(seed=3)]))
