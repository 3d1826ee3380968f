import dataclasses
from html.parser import HTMLParser

import made
import pytest

from kvfold.bench.report import methods, plot
from kvfold.bench.report import page as report
from kvfold.bench.report.plot import curves, score_over_bytes
from kvfold.bench.report.tables import tables
from kvfold.bench.report.times import chosen, over_context, time_over_context
from kvfold.errors import FileError

VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Follows the tags: what is open, what is loaded from elsewhere, how many rows there are. It changes."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.rows, self.text = [], [], 0, []

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        loading = ("src",) if tag == "a" else ("src", "href")  # a link to elsewhere loads nothing until it is followed
        self.loaded += [value for name, value in attrs if name in loading and value[:1] not in ("#", "")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src",)]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


def test_the_page_is_well_formed_and_loads_nothing():
    page = read(report.html(made.run()))
    assert page.open == []
    assert page.loaded == ["data:,"]  # the empty icon, so that a browser asks for none


def test_the_page_has_every_row_and_every_record():
    page = read(report.html(made.run()))
    # The table with better scopes, a table of each of four methods, then what ran where.
    assert page.rows == (1 + 5) + (4 + 7) + (1 + 7)
    said = "".join(page.text)
    assert 'snapkv(keep=0.2, scope="turn")' in said
    assert "best guess that does not know" in said


def test_a_name_with_markup_stays_text():
    text = report.html([made.record(model="<script>alert(1)</script>")])
    assert "<script>alert" not in text
    assert read(text).open == []


def test_the_same_records_give_the_same_page():
    assert report.html(made.run()) == report.html(made.run())


def test_a_method_is_one_curve_and_the_edges_are_none():
    (shown,) = tables(made.run())
    found = curves(shown)
    assert {name: [row.record.keep for row in rows] for name, rows in found.items()} == {
        "snapkv": [0.2, 0.5],
        "streaming_llm": [0.5],
    }


def test_the_picture_names_its_curves_and_levels():
    picture = score_over_bytes(tables(made.run())[0])
    for word in ("snapkv", "streaming_llm", "full cache 0.90", "no history 0.05"):
        assert word in picture


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = report.write(made.run(), tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(FileError, match="No space left on device"):
        report.write(made.run()[:3], tmp_path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [report.FILE_NAME]


def test_tables_in_a_text_are_renewed_between_their_marks_and_nowhere_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nSTALE\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_into(made.run(), path)
        text = path.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n")
        assert text.endswith(f"{report.END}\nafter\n")
        assert text.count("**chat 1 on tiny") == 1
        assert "STALE" not in text


def test_a_text_without_marks_is_left_as_it_is(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("no place")
    with pytest.raises(FileError, match="it has no place for them"):
        report.write_into(made.run(), path)
    assert path.read_text() == "no place"


def at_two_lengths():
    """What the suite speed would leave of two context lengths."""
    return [
        made.record(
            plan, keep, suite="speed", settings={"tokens": tokens, "stage": "decode"}, tpot_seconds=tokens * 1e-5,
            metrics={"seconds": tokens * 1e-5, "stock_seconds": tokens * 3e-5},
        )
        for tokens in (4096, 1024)
        for plan, keep in (("full", None), ("snapkv(keep=0.5)", 0.5))
    ]  # fmt: skip


def test_time_over_context_has_a_curve_for_each_plan_and_the_stock_cache():
    (found,) = over_context([*made.run(), *at_two_lengths()])
    assert list(found.lines) == ["full", "stock cache", "snapkv(keep=0.5)"]
    assert list(found.lines["full"]) == [1024, 4096]
    assert found.lines["stock cache"][1024] == pytest.approx(1024 * 3e-5)
    picture = time_over_context(found)
    for word in ("stock cache", "tokens of context", "seconds a token", "4,096"):
        assert word in picture
    assert picture in report.html(at_two_lengths())
    assert time_over_context(found, page="dark") in report.html(at_two_lengths())


def test_of_many_plans_the_quickest_are_drawn_beside_full_and_the_stock_cache():
    quick = [f"way{number}(keep=0.5)" for number in range(6)]
    others = [
        dataclasses.replace(record, plan=plan, metrics={"seconds": number + 1.0})
        for number, plan in enumerate(quick)
        for record in at_two_lengths()
        if record.keep is not None
    ]
    (found,) = over_context([*at_two_lengths(), *others])
    assert chosen(found) == ["full", "stock cache", "snapkv(keep=0.5)", *quick[:3]]
    assert "The table has 3 others." in time_over_context(found)


def test_one_length_is_no_curve():
    assert over_context(at_two_lengths()[:2]) == []


def test_each_method_has_its_own_words_its_plan_texts_and_its_rows():
    records = [
        *made.run(),
        made.record("snapkv(keep=0.5) + int8(group=32)", 0.5),
        made.record("kvpress:ThinK(keep=0.5)"),
    ]
    found = {one.name: one for one in methods.methods(records)}
    assert list(found) == ["full", "none", "snapkv", "streaming_llm", "int8", "kvpress:ThinK"]
    assert [row[0] for row in found["int8"].rows] == ["snapkv(keep=0.5) + int8(group=32)"]
    assert len(found["snapkv"].rows) == 5
    assert "arxiv.org/abs/2404.14469" in " ".join(found["snapkv"].words)
    assert any(words.startswith("Ours differs") for words in found["snapkv"].words)
    assert "window=32" in found["snapkv"].settings
    assert found["snapkv"].words[0].startswith("Keep ")
    page = report.html(records)
    for one in found.values():
        assert f'id="{one.anchor}"' in page
    assert 'href="#method-kvpress-ThinK"' in page


def test_code_and_addresses_in_a_paragraph_are_marked_as_such():
    said = report.linked("Source: `model < 2`, https://arxiv.org/abs/2404.14469.")
    link = '<a href="https://arxiv.org/abs/2404.14469">https://arxiv.org/abs/2404.14469</a>'
    assert said == f"Source: <code>model &lt; 2</code>, {link}."


def test_a_plan_breaks_after_a_bracket_and_nowhere_else():
    assert report.breaking("h2o(keep=0.5)") == "h2o(<wbr>keep=0.5)"
    assert report.breaking("a<b>(") == "a&lt;b&gt;("


def test_a_method_that_is_no_longer_there_is_shown_by_its_plan():
    (one,) = methods.methods([made.record("gone(keep=0.5)")])
    assert (one.name, one.axis) == ("gone", "unknown")
    assert one.rows[0][0] == "gone(keep=0.5)"


@pytest.mark.parametrize(("full", "top"), [(0.9, 1.0), (0.02, 0.02), (1.4, 1.4)])
def test_a_picture_ends_where_the_scores_of_its_suite_do(full, top):
    (shown,) = tables([made.record("full", None, (full,) * 4, full=full)])
    assert plot._top(shown) == pytest.approx(top)
