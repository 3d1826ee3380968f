import json
import lzma

import pytest

from kvfold.data.files import prose, read_rows
from kvfold.errors import DataError

ROWS = [{"text": "One\u2028line."}, {"text": "Two."}]


def test_the_same_rows_come_from_plain_and_packed_files(tmp_path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    assert read_rows(tmp_path / "a.jsonl", fields=["text"]) == read_rows(tmp_path / "a.jsonl.xz") == ROWS


def test_a_text_is_one_row(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time.\nThe end.")
    assert read_rows(tmp_path / "a.txt", fields=["text"]) == [{"text": "Once upon a time.\nThe end."}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"a,b", "convert it"),
        ("a.jsonl", b'{"text": "a"}\n{"text', "line 2 is not JSON"),
        ("a.jsonl", b"[1]", "line 1 is no object"),
        ("a.jsonl", b"\n\n", "no row in it"),
        ("a.txt", b" \n", "no row in it"),
        ("a.jsonl", b'{"text": "a"}\n{"question": "b"}', "row 2 holds question and no text"),
        ("a.jsonl.xz", b'{"text": "a"}', "broken"),
        ("a.jsonl", b"\xff\xfe", "broken"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read_rows(tmp_path / name, fields=["text"])
    assert name in str(caught.value)


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "a.jsonl")


def test_what_was_said_is_text_with_its_speakers():
    said = [{"speaker": "Grad A", "content": "OK . "}, {"speaker": "Grad B", "content": "Fine ."}]
    assert prose({"messages": said}) == "Grad A: OK .\nGrad B: Fine ."
    assert prose({"messages": [{"role": "user", "content": "Hello."}]}) == "Hello."
