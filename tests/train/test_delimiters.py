"""Delimiters measured by attention: what is near counts for a mark, what is far against it; sentkv reads the file."""

import json

import pytest
import torch

import kvfold
from kvfold.cli.main import run as command
from kvfold.errors import DataError
from kvfold.hf.load import load
from kvfold.place.sentences import BEST, ENDS, WORST, mark
from kvfold.train import delimiters

TEXT = " ".join("He came in, sat down; then he said: no! Why? (So it was.) " for _ in range(60))


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", dtype=torch.float32)


def test_leaning_is_attention_onto_near_tokens_less_that_onto_older_ones(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(delimiters, "NEAR", 4)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:24]])
    found = delimiters._leaning(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    weights = torch.stack(layers).mean(dim=(0, 1, 2))
    near = torch.stack([weights[at, max(0, at - 3) : at + 1].sum() for at in range(24)])
    torch.testing.assert_close(found, 2 * near - 1, atol=2e-4, rtol=0)


def test_levels_lie_between_the_worst_and_the_best_and_rare_marks_keep_theirs(tiny):
    ends = delimiters.measure(*tiny, [TEXT])
    measured = [ends[one] for one in ".,;:!?"]
    assert {min(measured), max(measured)} <= {WORST, WORST + 1, BEST - 1, BEST}
    assert max(ends[one] for one in ".,;:!?)") == BEST
    assert ends["。"] == ENDS["。"]


def test_a_text_without_ends_is_refused(tiny):
    with pytest.raises(DataError, match="give a longer text"):
        delimiters.measure(*tiny, ["word " * 400])


def test_the_command_writes_what_sentkv_reads(tiny, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "ends.json"
    text.write_text(TEXT)
    assert command(["delimiters", "--text", str(text), "--out", str(out)]) == 0
    assert "the levels are in" in capsys.readouterr().out
    ends = json.loads(out.read_text())
    assert set(ENDS) <= set(ends)
    assert mark(",", ends) & 7 == ends[","]
    model, tokenizer = tiny
    past = kvfold.cache(model, f"sentkv(budget=64, ends={str(out)!r})", tokenizer=tokenizer)
    inputs = tokenizer(TEXT, return_tensors="pt")
    model.generate(**inputs, past_key_values=past, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("content", ["", "[]", '{".": 9}'])
def test_a_file_that_holds_no_levels_is_one_line(tiny, tmp_path, content):
    wrong = tmp_path / "ends.json"
    wrong.write_text(content)
    with pytest.raises(kvfold.KvfoldError, match="kvfold delimiters"):
        kvfold.cache(tiny[0], f"sentkv(budget=64, ends={str(wrong)!r})")
