"""What is retained of the gain by history: known numbers, and where there is none."""

import dataclasses

import made
import pytest

from kvfold.bench.report.retained import retained
from kvfold.bench.report.tables import tables
from kvfold.bench.run.statistics import retained as share_of
from kvfold.errors import FileError


def test_the_share_is_of_the_means_and_lies_within_its_interval():
    full, none = [1.0, 0.8] * 10, [0.2, 0.0] * 10
    half = [(one + other) / 2 for one, other in zip(full, none, strict=True)]
    assert share_of(full, full, none) == (1.0, (1.0, 1.0))
    assert share_of(none, full, none) == (0.0, (0.0, 0.0))
    share, (low, high) = share_of(half, full, none)
    assert share == pytest.approx(0.5)
    assert low == pytest.approx(high) == pytest.approx(0.5)
    noisy = [value + step for value, step in zip(half, [0.2, -0.2, 0.1, -0.1] * 5, strict=True)]
    share, (low, high) = share_of(noisy, full, none)
    assert low < 0.5 < high
    assert share == pytest.approx(0.5)


def test_where_history_brings_nothing_there_is_no_share():
    scores = [1.0, 0.0] * 10
    assert share_of(scores, scores, scores) is None


def test_a_plan_is_a_row_and_a_suite_a_column():
    other = [dataclasses.replace(one, suite="needle", outcomes=(0.5,) * len(one.outcomes)) for one in made.run()]
    text = retained(tables([*made.run(), *other]))
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["plan", "chat", "needle"]
    assert all(len(row) == 3 for row in rows)
    assert not any(row[0] in ("`full`", "`none`") for row in rows)
    assert any("(" in row[1] for row in rows[1:])
    assert all(row[2] == "" for row in rows[1:])


def test_two_runs_of_one_suite_are_refused():
    other = [dataclasses.replace(one, seed=9) for one in made.run()]
    with pytest.raises(FileError, match="several samples"):
        retained(tables([*made.run(), *other]))
