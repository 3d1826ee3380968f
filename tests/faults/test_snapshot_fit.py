"""Tensors of a snapshot that do not fit each other are refused before anything is made of them."""

import json
from dataclasses import replace

import pytest
import torch

from kvfold.errors import FileError
from kvfold.memory.snapshot import Snapshot, put_back, take
from kvfold.memory.snapshot_fit import refuse_undeclared
from memories import Fed, tail_of

PLANS = [
    "h2o(keep=0.4)",
    "snapkv(keep=0.5, window=4)",
    "int4(group=8)",
    "sentkv(budget=16, length=5, window=2, recent=2)",
]
DEEDS = {
    "rows": lambda tensor: torch.cat([tensor, tensor]),
    "sizes": lambda tensor: tensor[..., None].contiguous(),
    "wide": lambda tensor: tensor.double() if not tensor.is_floating_point() else tensor.to(torch.int64),
}


def lived(plan):
    run = Fed(plan)
    for seed in range(3):
        run.with_text(12, seed=seed, classes=[5] * 12)
        run.memory.fold(until=12 * seed + 9)
    return run


def changed(run, name, deed):
    snapshot = take(run.memory)
    tensors = {key: tensor.clone() for key, tensor in snapshot.tensors.items()}
    return Snapshot(tensors=tensors | {name: deed(tensors[name])}, plain=json.loads(json.dumps(snapshot.plain)))


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_tensor_of_another_shape_or_kind_of_number_is_refused(plan, deed):
    run = lived(plan)
    for name in take(run.memory).tensors:
        with pytest.raises((FileError, RuntimeError)):
            put_back(Fed(plan).memory, changed(run, name, DEEDS[deed]))


def test_what_fits_is_put_back():
    for plan in PLANS:
        run, twin = lived(plan), Fed(plan)
        put_back(twin.memory, take(run.memory))
        assert take(twin.memory).plain == take(run.memory).plain


def test_one_letter_is_one_size_in_all_values():
    tail, other = tail_of([[True, True]]), tail_of([[True, True], [True, False]])
    refuse_undeclared(tail, tail)
    with pytest.raises(ValueError, match=r"keys of \[2, 2, 2, 8\] .* does not fit the others"):
        refuse_undeclared(tail, other)
    with pytest.raises(ValueError, match="positions of"):
        refuse_undeclared(replace(tail, positions=tail.positions.double()))


def test_sums_of_other_slots_are_refused():
    run = lived("h2o(keep=0.4)")
    snapshot = take(run.memory)
    plain = json.loads(json.dumps(snapshot.plain))
    counts = plain["layers"]["0"]["records"]["attention_sums"]["counts"]
    counts[0][0], counts[0][1] = counts[0][0] - 1, counts[0][1] + 1
    with pytest.raises(FileError, match="other slots"):
        put_back(Fed("h2o(keep=0.4)").memory, Snapshot(tensors=snapshot.tensors, plain=plain))
