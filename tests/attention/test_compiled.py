"""The compiled decode step against attention with everything written out, for every way that a number is stored."""

import copy
import shutil
from itertools import accumulate, pairwise

import pytest
import torch

import kvfold
from driving import feed
from fakes import model_of, text
from kvfold.attention.kernels import compiled
from kvfold.attention.kernels.compiled import Form, StoredSlots, append, decode
from kvfold.attention.reference import attend_part
from kvfold.encode.dense import Dense
from kvfold.encode.int4 import Int4
from kvfold.encode.int8 import Int8
from kvfold.memory import layer
from kvfold.memory.dense import DensePart

HEADS, GROUP = 2, 3
CODECS = {
    "dense": Dense(), "int8": Int8(), "int8 rotated": Int8(rotate=True), "int8 in groups of 16": Int8(group=16),
    "int4": Int4(), "int4 rotated": Int4(rotate=True), "int4 of one group": Int4(group=64),
}  # fmt: skip
# Each codec with a head of 64; those whose groups fit shorter heads with these too.
SIZED = [
    *((name, 64) for name in CODECS),
    *((name, size) for name in ("dense", "int8", "int8 rotated") for size in (8, 24)),
]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat_part(codec, keys, values, counts):
    """Slots of both heads one after the other, as a codec writes them, for the kernel."""
    form = codec.form(codec.encode(keys, values))
    assert form is not None
    assert form.is_readable
    return StoredSlots(form, spans=list(pairwise(accumulate(counts, initial=0))))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "size"), SIZED)
@torch.no_grad()
def test_parts_of_any_form_are_attended_as_if_written_out(name, dtype, size):
    codec, counts = CODECS[name], [(5, 41), (100, 7)]
    queries = numbers(1, HEADS * GROUP, 1, size, seed=9, dtype=dtype)
    parts, written = [], []
    for seed, of_heads in enumerate(counts):
        keys, values = (numbers(sum(of_heads), size, seed=2 * seed + side, dtype=dtype) for side in (0, 1))
        parts.append(flat_part(codec, keys, values, of_heads))
        written.append([side.split(of_heads) for side in codec.decode(codec.encode(keys, values), dtype)])
    output, sums = decode(queries, parts, heads=HEADS, scale=0.2)
    for head in range(HEADS):
        keys, values = (torch.cat([part[side][head] for part in written])[None, None] for side in (0, 1))
        of_head = slice(head * GROUP, (head + 1) * GROUP)
        wanted, wanted_sums = attend_part(
            queries[:, of_head].float(), keys.float(), values.float(), scale=0.2, mask=None
        )
        near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(output[:, of_head].float(), wanted, **near)
        torch.testing.assert_close(sums[:, of_head], wanted_sums, **near)


@needs_compiler
@torch.no_grad()
def test_heads_without_slots_read_nothing_and_large_scores_overflow_nothing():
    keys, values = 90 * numbers(3, 32), numbers(3, 32, seed=1)
    part = flat_part(Dense(), keys, values, (0, 3))
    queries = 50 * numbers(1, HEADS, 1, 32, seed=2)
    output, sums = decode(queries, [part], heads=HEADS, scale=1.0)
    assert not output[:, 0].any()
    assert sums[0, 0, 0] == -torch.inf
    best = int((queries[0, 1] @ keys.T).argmax())
    torch.testing.assert_close(output[0, 1, 0], values[best])


@needs_compiler
@torch.no_grad()
def test_more_threads_say_the_same(monkeypatch):
    monkeypatch.setattr(compiled, "_SHARED_SLOTS", 1)
    keys, values = numbers(80, 32), numbers(80, 32, seed=1)
    part = flat_part(Int8(), keys, values, (30, 50))
    queries, before = numbers(1, HEADS * GROUP, 1, 32, seed=2), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(decode(queries, [part], heads=HEADS, scale=0.3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])


@needs_compiler
@torch.no_grad()
def test_what_the_kernel_does_not_read_is_left_to_torch():
    queries = numbers(1, HEADS, 1, 20)
    keys, values = numbers(1, HEADS, 4, 20), numbers(1, HEADS, 4, 20)
    form = Form.plain(keys, values)
    assert form is not None
    assert not form.is_readable, "20 is no multiple of 8"
    assert Form.plain(keys.double(), values.double()) is None
    assert Form.plain(keys, values[..., :8]) is None
    assert not Form.plain(*(numbers(1, HEADS, 4, 64)[..., :32] for _ in "kv")).is_readable, "it has gaps"
    assert decode(queries, [], heads=HEADS, scale=1.0) is None
    with torch.enable_grad():
        assert decode(numbers(1, HEADS, 1, 32), [], heads=HEADS, scale=1.0) is None


@needs_compiler
@pytest.mark.parametrize("plan", ["full", "snapkv(tokens=14)", "int8", "int4(rotate=True)", "sentkv(budget=0.3)"])
def test_a_model_says_the_same_with_and_without_the_kernel(plan, monkeypatch):
    model, ids = model_of("llama"), text(2, 60)

    def said():
        compiled._kernel.cache_clear()
        cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
        found = [feed(model, ids[:, :40], cache)]
        cache.fold()
        return torch.cat(found + [feed(model, ids[:, at : at + 1], cache) for at in range(40, 60)], dim=1)

    used = []
    monkeypatch.setattr(layer, "decode", lambda *given, **more: used.append(decode(*given, **more)) or used[-1])
    with_kernel = said()
    assert all(used)
    used.clear()
    monkeypatch.setenv("KVFOLD_KERNELS", "off")
    without = said()
    assert used
    assert not any(used)
    compiled._kernel.cache_clear()
    torch.testing.assert_close(with_kernel, without, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_compiler_that_fails_leaves_no_file_and_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("KVFOLD_HOME", str(tmp_path))
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    compiled._kernel.cache_clear()
    assert compiled._kernel(32) is None
    assert not list(tmp_path.glob("kernels/*"))
    compiled._kernel.cache_clear()


@needs_compiler
def test_numbers_of_others_are_as_before_once_the_kernel_is_loaded():
    assert compiled._kernel(32) is not None
    assert 5e-324 * 1.0 > 0, "denormal numbers are flushed to zero in the whole process"
    assert float(torch.tensor([1e-40]) * 1) > 0


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_a_token_is_written_behind_those_of_its_row_and_head(shared, dtype):
    rows, room, at = 3, 7, 4
    keys, values = (numbers(rows, HEADS, room, 16, seed=side, dtype=dtype) for side in (0, 1))
    positions = torch.full((rows, room), -1, dtype=torch.int32)
    new_keys, new_values = (numbers(rows, HEADS, 1, 16, seed=side, dtype=dtype) for side in (2, 3))
    there = torch.tensor([[41]]).expand(rows, 1) if shared else torch.tensor([[41], [5], [9]])
    form = Form.plain(keys, values)
    assert form is not None
    wanted = [keys.clone(), values.clone(), positions.clone()]
    wanted[0][:, :, at : at + 1] = new_keys
    wanted[1][:, :, at : at + 1] = new_values
    wanted[2][:, at : at + 1] = there
    tail = StoredSlots(form, stride=room)
    assert append(tail, at, new_keys, new_values, there, into=positions)
    assert all(torch.equal(found, own) for found, own in zip((keys, values, positions), wanted, strict=True))


@needs_compiler
@torch.no_grad()
def test_a_token_of_another_kind_is_left_to_torch():
    keys, values = numbers(1, HEADS, 7, 16), numbers(1, HEADS, 7, 16, seed=1)
    form = Form.plain(keys, values)
    assert form is not None
    tail, into = StoredSlots(form, stride=7), torch.zeros(1, 7, dtype=torch.int32)
    token, at = numbers(1, HEADS, 1, 16), torch.tensor([[3]])
    assert not append(tail, 2, token.half(), token.half(), at, into=into)
    twice = token.expand(2, -1, -1, -1)
    assert not append(tail, 2, twice, twice, at.expand(2, 1), into=into.repeat(2, 1)), "it has gaps"
    assert not append(tail, 2, token, token, at.int(), into=into)
    with torch.enable_grad():
        assert not append(tail, 2, token, token, at, into=into)
    assert not into.any()


@pytest.mark.parametrize("counts", [(30, 30), (20, 40)])
def test_the_slots_of_all_heads_say_whether_threads_share_them_out(counts):
    keys, values = numbers(sum(counts), 32), numbers(sum(counts), 32, seed=1)
    part = DensePart(
        codec=Dense(),
        counts=(counts,),
        payload={"keys": keys, "values": values},
        positions=torch.arange(60, dtype=torch.int32),
        dtype=keys.dtype,
    )
    assert part.stored is not None
    assert part.stored.slots == 60
    assert copy.deepcopy(part.stored).slots == 60
    assert StoredSlots(part.stored.given[0], stride=30).slots == 0, "a tail's slots are given when it is read"
