"""Every codec: what comes back, how far it may be off, and what it takes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.encode.base import SlotCodec
from kvfold.encode.dense import Dense
from kvfold.encode.int2 import Int2
from kvfold.encode.int4 import Int4
from kvfold.encode.int8 import Int8
from kvfold.errors import CacheError
from kvfold.memory.dense import DensePart
from kvfold.memory.kv import KV
from kvfold.memory.step import AttentionStep
from kvfold.plan import members

CODECS = {name: kind for name, kind in members("encode").items() if issubclass(kind, SlotCodec)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_each_slot_stands_alone(name, dtype):
    """Slots may be dropped, reordered and reshaped after they were written."""
    codec, keys, values = CODECS[name](), torch.randn(12, 16).to(dtype), torch.randn(12, 16).to(dtype)
    payload = codec.encode(keys, values)
    assert all(tensor.shape[0] == 12 for tensor in payload.values())
    whole = codec.decode(payload, dtype)
    order = torch.tensor([7, 2, 2, 11])
    some = codec.decode({key: tensor[order] for key, tensor in payload.items()}, dtype)
    square = codec.decode({key: tensor.view(2, 3, 2, *tensor.shape[1:]) for key, tensor in payload.items()}, dtype)
    for one, part, wide in zip(whole, some, square, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one[order], part)
        assert torch.equal(one.view(2, 3, 2, 16), wide)


@pytest.mark.parametrize("name", CODECS)
def test_no_slots_at_all_are_written_and_read(name):
    codec = CODECS[name]()
    keys, values = codec.decode(codec.encode(torch.empty(0, 16), torch.empty(0, 16)), torch.float32)
    assert keys.shape == values.shape == (0, 16)


@pytest.mark.parametrize(("codec", "levels"), [(Int8(group=8), 254), (Int4(group=8), 15), (Int2(group=8), 3)])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-4, 1.0, 300.0]), shift=st.sampled_from([0.0, 5.0]))
def test_rounding_is_at_most_half_a_step_of_its_group(codec, levels, seed, size, shift):
    numbers = (torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) + shift) * size
    found = codec.decode(codec.encode(numbers, numbers), torch.float32)[0]
    grouped = numbers.unflatten(-1, (2, 8))
    low, high = grouped.amin(-1), grouped.amax(-1)
    span = high - low if levels < 254 else 2 * grouped.abs().amax(-1)
    float16 = grouped.abs().amax(-1) * 2**-10 + 127 * 6e-8  # what scales and lows in float16 may add
    bound = (span / levels / 2 * 1.01 + float16)[..., None]
    assert ((found.unflatten(-1, (2, 8)) - grouped).abs() <= bound).all()


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros(name):
    codec = CODECS[name]()
    found = codec.decode(codec.encode(torch.zeros(3, 16), torch.zeros(3, 16)), torch.float32)
    assert all((tensor.abs() < 1e-6).all() for tensor in found)


def test_bytes_of_a_slot_can_be_checked_by_hand():
    keys = torch.randn(10, 64)
    size = {name: sum(t.nbytes for t in codec.encode(keys, keys).values()) // 10 for name, codec in _BY_HAND.items()}
    assert size == {"dense": 512, "int8": 2 * (64 + 2 * 2), "int4": 2 * (32 + 2 * 4), "int2": 2 * (16 + 2 * 4)}


@pytest.mark.parametrize("kind", [Int8, Int4, Int2])
def test_a_rotated_part_is_read_by_rotated_queries_as_by_plain_ones(kind):
    rows = KV(torch.randn(2, 2, 9, 24), torch.randn(2, 2, 9, 24), torch.arange(9).expand(2, 2, 9))
    kept = torch.ones(2, 2, 9, dtype=torch.bool)
    kept[1, 0, 3:] = False  # heads that differ are read one by one
    part = DensePart.of(rows, kind(rotate=True), kept=kept)
    step = AttentionStep(queries=torch.randn(2, 4, 3, 24), scale=0.3)
    answer, _ = part.attend(step)
    decoded = kind(rotate=True).decode(part.payload, torch.float32)
    plain, _ = replace(part, codec=Dense(), payload=dict(zip(("keys", "values"), decoded, strict=True))).attend(step)
    assert torch.allclose(answer.output, plain.output, atol=1e-5)
    assert torch.allclose(answer.log_sum_exp, plain.log_sum_exp, atol=1e-5)


@pytest.mark.parametrize("kind", [Int8, Int4, Int2])
def test_rotation_makes_the_rounding_of_vectors_with_one_large_number_finer(kind):
    keys = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    keys[:, ::32] *= 30.0  # one dimension of each group, as models have them
    off = {}
    for rotate in (False, True):
        codec = kind(rotate=rotate)
        off[rotate] = float((codec.decode(codec.encode(keys, keys), torch.float32)[0] - keys).square().mean())
    assert off[True] < off[False] / 2


_BY_HAND = {"dense": Dense(), "int8": Int8(), "int4": Int4(), "int2": Int2()}


@pytest.mark.parametrize("codec", [Int8(group=32), Int4(group=32), Int2(group=32)])
def test_a_group_that_does_not_divide_the_head_is_the_whole_head(codec):
    keys = torch.randn(4, 24)
    payload = codec.encode(keys, keys)
    assert [t.shape[-1] for name, t in payload.items() if "scales" in name or "steps" in name] == [1, 1]
    steps = next(numbers for name, numbers in payload.items() if "scales" in name or "steps" in name)
    assert (codec.decode(payload, torch.float32)[0] - keys).abs().max() < 0.6 * float(steps.max())


def test_keys_and_values_may_differ_in_size():
    for codec in _BY_HAND.values():
        keys, values = codec.decode(codec.encode(torch.randn(5, 16), torch.randn(5, 8)), torch.float32)
        assert (keys.shape, values.shape) == ((5, 16), (5, 8))


@pytest.mark.parametrize(("codec", "size"), [(Int4(), 7), (Int2(), 6), (Int2(rotate=True), 10)])
def test_heads_that_do_not_fill_bytes_are_refused(codec, size):
    with pytest.raises(CacheError, match=f"heads of {size} dimensions .* fold by int8"):
        codec.encode(torch.randn(3, size), torch.randn(3, size))


@pytest.mark.parametrize(("codec", "largest"), [(Int8(), 8e6), (Int4(), 6e4), (Int8(rotate=True), 1e6)])
def test_numbers_too_large_for_a_scale_are_refused_in_one_line(codec, largest):
    keys = torch.full((2, 64), largest)
    stored = codec.decode(codec.encode(keys, keys), torch.float32)[0]
    torch.testing.assert_close(stored, keys, rtol=0.02, atol=0)
    for wrong in (3e38, float("inf"), float("nan")):
        with pytest.raises(CacheError, match="was to be stored in few bits"):
            codec.encode(torch.full((2, 64), wrong), keys)
