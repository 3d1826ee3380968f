"""The measurement of a long talk: caches with kept positions end, compact ones go on, and the page shows its record."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import POSITIONS, model_of, text

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "records" / "no-last-position"
WAYS = ("kept", "compact")
PAGE = ROOT / "docs" / "how-to" / "no-last-position.md"


@pytest.fixture(scope="module")
def long_talk() -> Any:
    """The file of docs/make, which is no package."""
    spec = importlib.util.spec_from_file_location("long_talk", ROOT / "docs" / "make" / "long_talk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kept_positions_end_and_compact_ones_go_on(long_talk):
    model, ids = model_of("llama"), text(1, POSITIONS + 200, seed=1)[0].tolist()
    talk = (ids[start : start + 50] for start in range(0, len(ids), 50))
    with torch.no_grad():
        readers = long_talk.ways(model, ["streaming_llm(tokens=40)"])
        rows = list(long_talk.measured(model, talk, readers, 200))
    plans = {(row["plan"], row["positions"]) for row in rows}
    assert plans == {("stock", "kept"), ("streaming_llm(tokens=40)", "kept"), ("streaming_llm(tokens=40)", "compact")}
    last = [row for row in rows if row["positions"] == "compact"][-1]
    assert last["next_position"] == 40
    assert all(row["kl_from_stock"] == 0 for row in rows if row["plan"] == "stock")
    read = [sum(row["tokens"] for row in rows if row["positions"] == way and row["plan"] != "stock") for way in WAYS]
    assert read[0] < POSITIONS < read[1]


def test_the_talk_is_as_long_as_it_was_asked_for(long_talk, tmp_path):
    said = {"messages": [{"role": "user", "content": "to be"}, {"role": "assistant", "content": "or not to be"}]}
    (tmp_path / "talk.jsonl").write_text("\n".join([json.dumps(said)] * 9), encoding="utf-8")

    def tokenizer(text, **_):
        return type("Encoded", (), {"input_ids": list(range(len(text.split())))})

    pieces = list(long_talk.pieces(tmp_path / "talk.jsonl", tokenizer, 20))
    assert sum(map(len, pieces)) >= 20
    assert len(pieces) == 1, "short messages are read together"


@pytest.mark.parametrize("file", sorted(RECORDS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_the_page_shows_what_the_record_says(file):
    numbers = set(re.findall(r"\d+\.\d+", PAGE.read_text(encoding="utf-8")))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    shown = [f"{row['perplexity']:.2f}" for row in rows if row["tokens"] > 1900]
    assert rows
    assert not [number for number in shown if number not in numbers]
