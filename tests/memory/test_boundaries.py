"""After which columns a cache folds by itself: at the end of the prompt and every stride after it, in any chunks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.memory.forward import Boundaries


def marks(boundaries, chunks):
    """Every boundary that is met while these chunks are fed."""
    met, fed = [], 0
    for new in chunks:
        met += [fed + mark for mark in boundaries.within(fed, new)]
        fed += new
    return met


def test_the_prompt_and_then_every_stride():
    assert marks(Boundaries(prompt=10, stride=4), [25]) == [10, 14, 18, 22]
    assert marks(Boundaries(prompt=10), [25]) == [10]
    assert marks(Boundaries(prompt=0, stride=4), [9]) == [4, 8]
    assert marks(Boundaries(), [25]) == []


@settings(deadline=None)
@given(st.integers(0, 20), st.one_of(st.none(), st.integers(1, 9)), st.lists(st.integers(1, 12), max_size=12))
def test_chunks_change_nothing(prompt, stride, chunks):
    boundaries = Boundaries(prompt=prompt, stride=stride)
    whole = [sum(chunks)] if chunks else []
    assert marks(boundaries, chunks) == marks(boundaries, whole)
    assert marks(boundaries, [1] * sum(chunks)) == marks(boundaries, whole)
