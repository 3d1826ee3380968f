import json

import made
import pytest

from kvfold.cli.main import run


@pytest.fixture
def folder(tmp_path):
    from kvfold.bench.run.journal import Journal

    kept = Journal(tmp_path / "run")
    for record in made.run():
        kept.write(record)
    return tmp_path / "run"


def test_the_page_is_written_and_its_place_is_said(folder, tmp_path, capsys):
    assert run(["report", str(folder), "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert f"written: {tmp_path / 'page' / 'report.html'}" in out
    assert "snapkv" in out
    assert (tmp_path / "page" / "report.html").read_text().startswith("<!doctype html>")


def test_json_prints_the_records_and_nothing_else(folder, capsys):
    assert run(["report", str(folder), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["plan"] for line in lines] == [record.plan for record in made.run()]


def test_markdown_prints_tables(folder, capsys):
    assert run(["report", str(folder), "--markdown"]) == 0
    assert "| `snapkv(keep=0.5" in capsys.readouterr().out


def test_a_picture_is_an_svg_that_does_not_change(folder, tmp_path, capsys):
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    for picture in pictures:
        assert run(["report", str(folder), "--picture", str(picture)]) == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert pictures[0].read_text().startswith("<svg")
    assert run(["report", str(folder), "--picture", str(pictures[1]), "--dark"]) == 0
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_a_folder_without_records_is_one_line_and_code_2(tmp_path, capsys):
    assert run(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "there is no records.jsonl" in err
