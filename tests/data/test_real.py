"""Readers of real text: every field form, and clear errors."""

import json
import lzma

import pytest

from kvfold.data import real
from kvfold.errors import DataError


def write(folder, name, rows):
    with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def test_each_form_of_row_becomes_text(tmp_path):
    write(
        tmp_path,
        "talk",
        [{"messages": [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes\u2028."}]}],
    )
    write(tmp_path, "story", [{"text": "Once."}])
    write(tmp_path, "sums", [{"question": "1+1?", "answer": "2"}])
    texts = list(real.documents(tmp_path, ["talk", "story", "sums"]))
    assert texts == [("talk", "Hi\nYes\u2028."), ("story", "Once."), ("sums", "1+1?\n2")]


def test_the_share_alike_set_is_not_among_those_that_ship():
    assert "sgd.train" not in real.SHIPPED


def test_training_reads_every_set_of_a_folder_but_share_alike_ones(tmp_path):
    for name in ("mine", "novels", "sgd.train"):
        write(tmp_path, name, [{"text": name}])
    assert real.sets(tmp_path) == ["novels", "mine"]
    assert list(real.documents(tmp_path)) == [("novels", "novels"), ("mine", "mine")]


def test_missing_sets_and_strange_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="--data"):
        list(real.documents(tmp_path, ["talk"]))
    with pytest.raises(DataError, match="no folder"):
        list(real.documents(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no"):
        list(real.documents(tmp_path))
    write(tmp_path, "odd", [{"id": 1}])
    with pytest.raises(DataError, match="convert it"):
        list(real.documents(tmp_path, ["odd"]))
