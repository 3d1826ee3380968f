from html.parser import HTMLParser

import made
import pytest

from kvfold.bench import report
from kvfold.bench.plot import curves, score_over_bytes
from kvfold.bench.tables import tables
from kvfold.errors import FileError

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Follows the tags: what is open, what is loaded from elsewhere, how many rows there are. It changes."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.rows, self.text = [], [], 0, []

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value[:1] not in ("#", "")]
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
    assert page.rows == (1 + 5) + (1 + 7)  # the table with better scopes, then what ran where
    said = "".join(page.text)
    assert 'snapkv(keep=0.2, scope="turn")' in said
    assert "best shortcut" in said


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
    for word in ("snapkv", "streaming_llm", "full cache 0.90", "no history 0.05", "best shortcut 0.30"):
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
