"""Sentences cover a text, keep their lengths, and are the same whether the text comes at once or in a stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import PlanError
from kvfold.place.sentences import Splitter, mark, table, weights

MARKS = [mark(text) for text in ("a", " the", ".", ",", "\n", " Dr", "3", '"', ")", "。", ";", " x", "…", "!\n")]
streams = st.lists(st.sampled_from(MARKS), max_size=300).map(bytes)


@st.composite
def splitters(draw):
    length = draw(st.integers(3, 40))
    return Splitter(length=length, window=draw(st.integers(0, length - 3)), share=draw(st.floats(0, 1)))


@given(marks=streams, splitter=splitters())
def test_sentences_cover_the_text_within_their_lengths(marks, splitter):
    cuts = splitter.cuts(marks)
    lengths = [stop - start for start, stop in zip((0, *cuts), cuts, strict=False)]
    assert all(splitter.length - splitter.window <= one <= splitter.longest for one in lengths)
    assert 0 <= len(marks) - (cuts[-1] if cuts else 0) <= splitter.longest


@given(marks=streams, splitter=splitters(), at=st.integers(0, 300))
def test_cuts_of_a_beginning_are_the_first_cuts_of_the_whole(marks, splitter, at):
    whole, begun = splitter.cuts(marks), splitter.cuts(marks[:at])
    assert whole[: len(begun)] == begun


@given(marks=streams, splitter=splitters(), at=st.integers(0, 20))
def test_a_text_may_be_cut_from_any_cut_on(marks, splitter, at):
    whole = splitter.cuts(marks)
    start = whole[min(at, len(whole) - 1)] if whole else 0
    assert tuple(start + cut for cut in splitter.cuts(marks[start:])) == tuple(cut for cut in whole if cut > start)


def test_a_text_without_ends_is_cut_into_pieces_of_the_length():
    assert Splitter(length=8, window=3).cuts(bytes(30)) == (8, 16, 24)
    assert Splitter(length=8, window=0).cuts(bytes(24)) == (8, 16, 24)


def ends(pieces):
    """The pieces after which a sentence may end, at least half as good as a full stop."""
    return [piece for piece, weight in zip(pieces, weights(table(pieces)), strict=True) if weight > 0.5]


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        (["It", " is", ".", " So"], ["."]),
        (["It", " is", " 3", ".", "14", " long", "."], ["."]),
        ([" Dr", ".", " Who", " came", "."], ["."]),
        ([" e.g", ".", " this"], []),
        (["He", " said", ":", ' "', "Go", ".", '"', " So"], [":", '"']),
        (["really", '?"', " he"], ['?"']),
        (["x", " =", " 1", ";", "\n", "}", "\n\n"], [";", "\n", "}", "\n\n"]),
        (["- ", "milk", "\n", "- ", "tea", "\n"], ["\n", "\n"]),
        (["我", "来", "。", "你", "走", "！"], ["。", "！"]),
        (["www", ".", "site", ".", "org"], []),
        (["1", ",", "000"], []),
        (["one", ",", " two"], [","]),
    ],
)
def test_ends_of_prose_numbers_code_lists_and_chinese(pieces, wanted):
    assert ends(pieces) == wanted


def test_a_full_stop_near_the_length_is_where_it_is_cut():
    marks = bytearray(60)
    marks[16] = mark(".")  # before what does not stand apart: no end
    marks[21] = mark("\n")
    assert Splitter(length=20, window=6).cuts(bytes(marks))[0] == 22


@pytest.mark.parametrize("settings", [{"length": 10, "window": 8}, {"length": 0, "window": 0}, {"share": 1.5}])
def test_lengths_that_cannot_be_are_refused(settings):
    with pytest.raises(PlanError, match="give"):
        Splitter(**settings)
