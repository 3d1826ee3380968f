"""The rule of the recommendation, for any sizes and losses."""

from hypothesis import given
from hypothesis import strategies as st

from kvfold.bench.advise.check import loss_of
from kvfold.bench.advise.choice import Loss, Option, choose

NUMBERS = st.floats(min_value=0, max_value=10, allow_subnormal=False)


@st.composite
def losses(draw):
    low, mean, high = sorted(draw(st.tuples(NUMBERS, NUMBERS, NUMBERS)))
    return Loss(mean=mean, low=low, high=high)


ANY_LOSS = st.none() | losses()


@st.composite
def lists_of_options(draw, *, loss=ANY_LOSS):
    found = draw(st.lists(st.tuples(st.integers(0, 100), loss), max_size=8))
    return [Option(plan=str(n), size_bytes=size, order=n, loss=lost) for n, (size, lost) in enumerate(found)]


@given(lists_of_options(), st.integers(0, 100))
def test_what_is_chosen_fits_and_something_is_chosen_where_anything_fits(options, memory):
    chosen = choose(options, memory)
    fitting = [option for option in options if option.size_bytes <= memory]
    assert (chosen is None) == (not fitting)
    assert chosen is None or chosen in fitting


@given(lists_of_options(loss=losses()), st.integers(0, 100))
def test_no_plan_is_chosen_that_loses_more_than_the_bound_of_a_smaller_loss_that_fits(options, memory):
    chosen = choose(options, memory)
    if chosen is None:
        return
    assert chosen.loss.mean <= chosen.loss.high
    others = [option.loss for option in options if option.size_bytes <= memory]
    least = min(others, key=lambda loss: loss.mean)
    assert chosen.loss.mean <= least.high


@given(lists_of_options(loss=losses()), st.integers(0, 100))
def test_no_smaller_plan_is_a_tie(options, memory):
    chosen = choose(options, memory)
    if chosen is None:
        return
    least = min((o.loss for o in options if o.size_bytes <= memory), key=lambda loss: loss.mean)
    smaller = [option for option in options if option.size_bytes < chosen.size_bytes]
    assert not [option for option in smaller if option.loss.mean <= least.high]


@given(lists_of_options(loss=st.none()), st.integers(0, 100))
def test_without_losses_the_stated_order_decides(options, memory):
    chosen = choose(options, memory)
    assert chosen is None or chosen.order == min(o.order for o in options if o.size_bytes <= memory)


@given(lists_of_options(loss=losses()), st.integers(0, 50), st.integers(0, 50))
def test_more_memory_never_loses_more_than_a_tie(options, memory, more):
    before, after = choose(options, memory), choose(options, memory + more)
    if before is not None:
        least = min((o.loss for o in options if o.size_bytes <= memory + more), key=lambda loss: loss.mean)
        assert after.loss.mean <= max(before.loss.mean, least.high)


def test_a_loss_that_is_not_measured_is_no_small_loss():
    known = Option(plan="known", size_bytes=10, order=1, loss=Loss(mean=1.0, low=0.9, high=1.1))
    unknown = Option(plan="unknown", size_bytes=5, order=0)
    assert choose([unknown, known], 10) is known


@given(st.lists(NUMBERS, min_size=2, max_size=4))
def test_an_interval_holds_its_mean_and_nothing_below_zero(values):
    loss = loss_of(values)
    assert 0 <= loss.low <= loss.mean + 1e-9
    assert loss.mean <= loss.high
