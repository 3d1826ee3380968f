"""Saved caches of version 1 are read under today's names: text once, sums and windows as records."""

import torch

from kvfold.memory.older_snapshots import renewed

HEADS = 2


def layer(**more):
    return {"seen": [6], "scale": 0.5, "start": 0, "sinks": None, "folded": None, "tail": None, "window": False} | more


def plain_of(**layers):
    return {"fed": 6, "boundaries": {}, "layers": {name.removeprefix("at"): words for name, words in layers.items()}}


def test_what_is_of_today_stays_as_it_is():
    plain = {"text_length": 3, "layers": {}}
    tensors = {"text.classes": torch.zeros(1, 4, dtype=torch.uint8)}
    again, moved = renewed(plain, tensors)
    assert again is plain
    assert moved == tensors


def test_a_window_becomes_a_record_and_where_a_layer_started_is_forgotten():
    plain, _ = renewed(plain_of(at0=layer(window=True), at2=layer()), {})
    assert plain["layers"]["0"]["records"] == {"window": {}}
    assert plain["layers"]["2"]["records"] == {}
    assert "start" not in plain["layers"]["0"]
    assert plain["text_length"] == 0


def test_sums_of_dense_parts_become_a_record_with_the_parts_counts():
    tensors = {"0.tail.mass": torch.rand(1, HEADS, 3), "0.folded.mass": torch.rand(5), "0.tail.keys": torch.rand(1)}
    words = layer(folded={"counts": [[2, 3]]})
    plain, moved = renewed(plain_of(at0=words), tensors)
    assert plain["layers"]["0"]["records"]["attention_sums"] == {"counts": [[2, 3]]}
    assert torch.equal(moved["0.attention_sums.raw"], tensors["0.tail.mass"])
    assert torch.equal(moved["0.attention_sums.folded"], tensors["0.folded.mass"])
    assert "0.tail.mass" not in moved
    assert "0.folded.mass" not in moved
    assert "0.tail.mass" in tensors


def test_sums_without_a_folded_part_have_counts_of_zero():
    plain, moved = renewed(plain_of(at0=layer()), {"0.tail.mass": torch.rand(2, HEADS, 3)})
    assert plain["layers"]["0"]["records"]["attention_sums"] == {"counts": [[0, 0], [0, 0]]}
    assert moved["0.attention_sums.folded"].shape == (0,)


def test_sums_of_low_rank_parts_are_put_in_reading_order():
    tensors = {
        "0.tail.mass": torch.rand(2, HEADS, 1),
        "0.folded.mass": torch.tensor([[3.0, 30.0], [1.0, 10.0], [2.0, 20.0], [7.0, 70.0]]),  # by level
        "0.folded.held": torch.tensor([[1, 2], [0, 1]]),
        "0.folded.positions": torch.tensor([3, 1, 2, 7]),
    }
    plain, moved = renewed(plain_of(at0=layer(folded={})), tensors)
    assert plain["layers"]["0"]["records"]["attention_sums"] == {"counts": [[3, 3], [1, 1]]}
    assert moved["0.attention_sums.folded"].tolist() == [1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 7.0, 70.0]


def test_texts_of_all_layers_become_one_transcript():
    tensors = {
        "0.folded.tiered_text": torch.tensor([[1, 2, 3]], dtype=torch.uint8),
        "0.tail.marks": torch.tensor([[4, 9, 5]], dtype=torch.uint8),
        "0.tail.positions": torch.tensor([[3, -1, 4]], dtype=torch.int32),
        "2.folded.tiered_text": torch.tensor([[1, 2, 3]], dtype=torch.uint8),
        "2.tail.marks": torch.tensor([[4, 9, 5]], dtype=torch.uint8),
        "2.tail.positions": torch.tensor([[3, -1, 4]], dtype=torch.int32),
    }
    plain, moved = renewed(plain_of(at0=layer(), at2=layer()), tensors)
    assert plain["text_length"] == 5
    assert moved["text.classes"][0, :5].tolist() == [1, 2, 3, 4, 5]
    assert not [name for name in moved if name.endswith(("tiered_text", "marks"))]


def test_a_text_that_was_never_folded_is_as_long_as_its_positions():
    tensors = {
        "0.tail.marks": torch.tensor([[4, 5]], dtype=torch.uint8),
        "0.tail.positions": torch.tensor([[0, 1]], dtype=torch.int32),
    }
    plain, moved = renewed(plain_of(at0=layer()), tensors)
    assert plain["text_length"] == 2
    assert moved["text.classes"][0, :2].tolist() == [4, 5]
