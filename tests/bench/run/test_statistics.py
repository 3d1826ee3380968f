import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.bench.run.statistics import difference, interval, intervals, retained

OUTCOMES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60)


@given(OUTCOMES)
def test_the_score_lies_in_its_interval(outcomes):
    low, high = interval(outcomes)
    assert 0.0 <= low <= np.mean(outcomes) <= high <= 1.0


@given(OUTCOMES)
def test_a_plan_ties_with_itself_exactly(outcomes):
    same = difference(outcomes, outcomes)
    assert (same.mean, same.low, same.high, same.tie) == (0.0, 0.0, 0.0, True)


@given(OUTCOMES, st.randoms())
def test_a_difference_turned_round_changes_its_sign(outcomes, random):
    other = random.sample(outcomes, len(outcomes))
    forth, back = difference(outcomes, other), difference(other, outcomes)
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-12)


def test_the_interval_is_that_of_the_binomial_where_samples_are_many():
    rng = np.random.default_rng(0)
    outcomes = (rng.random(2_000) < 0.3).astype(float)
    low, high = interval(outcomes.tolist())
    width = 1.96 * np.sqrt(outcomes.mean() * (1 - outcomes.mean()) / len(outcomes))
    assert (low, high) == pytest.approx((outcomes.mean() - width, outcomes.mean() + width), rel=0.02)


def test_four_times_the_samples_halve_the_interval():
    few, many = interval([1.0, 0.0] * 50), interval([1.0, 0.0] * 200)
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(2.0, rel=0.1)


def test_pairing_sees_what_two_intervals_cannot():
    hard = np.repeat([1.0, 0.0], 50)  # half the samples are easy for both
    first = hard.copy()
    second = hard.copy()
    second[:8] = 0.0  # the second misses eight that the first has
    apart = interval(first.tolist()), interval(second.tolist())
    assert apart[0][0] < apart[1][1], "the two intervals overlap"
    assert not difference(first.tolist(), second.tolist()).tie


def test_a_few_samples_of_noise_are_a_tie():
    rng = np.random.default_rng(1)
    first, second = (rng.random((2, 40)) < 0.5).astype(float)
    assert difference(first.tolist(), second.tolist()).tie


def test_intervals_are_the_same_on_every_call():
    assert interval([1.0, 0.0, 1.0]) == interval([1.0, 0.0, 1.0])


def test_the_interval_of_a_mean_is_the_interval_of_its_outcomes_and_a_ratio_of_sums_has_its_own():
    pairs = [(1.0, 1.0), (0.0, 1.0), (9.0, 10.0), (2.0, 8.0)]

    def measure(some):
        whole = sum(total for _, total in some)
        return {"mean": sum(part for part, _ in some) / len(some), "ratio": sum(part for part, _ in some) / whole}

    found = intervals(pairs, measure)
    assert found["mean"] == pytest.approx(interval([part for part, _ in pairs]))
    assert 0.0 <= found["ratio"][0] < 12 / 20 < found["ratio"][1] <= 1.0
    assert intervals(pairs, lambda some: {}) == {}


def test_a_number_that_some_resamples_lack_has_an_interval_over_the_others():
    found = intervals([1.0, 2.0], lambda some: {"rare": 2.0} if 2.0 in some else {})
    assert found == {"rare": (2.0, 2.0)}


def test_what_is_retained_has_bounds_where_some_draws_gain_nothing():
    full, none = [1.0] * 5 + [0.0] * 15, [0.0] * 20
    found = retained([1.0] * 4 + [0.0] * 16, full, none)
    assert found is not None
    share, (low, high) = found
    assert 0 <= low <= share <= high <= 1
