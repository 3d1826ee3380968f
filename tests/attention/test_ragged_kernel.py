"""The kernel over flat slots of ragged heads, against attention with everything written out.

On a card, and on a processor by Triton's interpreter; what it compiles to is looked at for cards that are not there.
"""

from dataclasses import replace

import pytest
import torch

from cards import CAPABILITIES, PLACES, Recorder, assert_interpreted, compiled, needs_compiler, starts_interpreter
from kvfold.attention.kernels import ragged
from kvfold.attention.kernels.ragged import FlatSlots, _splits
from kvfold.attention.reference import attend_part
from kvfold.attention.soft_cap import CappedScale
from kvfold.encode.dense import Dense
from kvfold.encode.int4 import Int4
from kvfold.encode.int8 import Int8
from kvfold.memory.dense import DensePart
from kvfold.memory.kv import KV
from kvfold.memory.room import UNLIMITED
from kvfold.memory.transcript import Transcript
from memories import SCALE, step_of

COUNTS = ((40, 0, 90), (150, 16, 1))  # slots of two rows of three heads
HEADS = len(COUNTS[0])
SPARE = 3  # places behind each head's slots
CODECS = {
    "dense": Dense(), "int8": Int8(), "int8 of one group": Int8(group=256), "int8 in groups of 8": Int8(group=8),
    "int4": Int4(), "int4 of one group": Int4(group=256),
}  # fmt: skip
# Head size, query heads of a key/value head, and new tokens; in half precision two are enough.
SHAPES = [(96, 3, 1), (128, 8, 1), (64, 1, 1), (80, 3, 2), (8, 2, 3)]
NEAR = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1e-2, 1e-2)}


@pytest.fixture
def anywhere(monkeypatch):
    """The kernel is taken for a processor's tensors too."""
    monkeypatch.setattr(ragged, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(ragged, "launches", lambda: True)


def spans():
    """Where each head's slots begin and end, and the places of all that are no slots."""
    found, room, start = [], [], 0
    for count in (count for row in COUNTS for count in row):
        found.append((start, start + count))
        room += range(start + count, start + count + SPARE)
        start += count + SPARE
    return found, room, start


def stored(codec, size, dtype, place):
    """Random slots as a codec writes them, with what is no number between the heads; and as they are read back."""
    where, room, total = spans()
    keys, values = (torch.randn(total, size).to(dtype) for _ in range(2))
    payload = codec.encode(keys, values)
    for tensor in payload.values():
        tensor[room] = torch.nan if tensor.is_floating_point() else 77
    payload = {name: tensor.to(place) for name, tensor in payload.items()}
    slots = FlatSlots.of(codec.form(payload), where)
    assert slots is not None
    return slots, codec.as_written(payload, dtype)


def written_out(queries, keys, values, scale):
    """Output and log-sum-exp head by head, in float32."""
    queries, keys, values = (tensor.float().cpu() for tensor in (queries, keys, values))
    output = torch.zeros_like(queries)
    sums = torch.full(queries.shape[:-1], -torch.inf)
    group = queries.shape[1] // HEADS
    for at, (start, stop) in enumerate(spans()[0]):
        row, head = divmod(at, HEADS)
        some = slice(head * group, (head + 1) * group)
        if start < stop:
            of_head = (side[None, None, start:stop] for side in (keys, values))
            output[row, some], sums[row, some] = (
                one[0] for one in attend_part(queries[row : row + 1, some], *of_head, scale=scale)
            )
    return output, sums


def assert_near(found, wanted, dtype):
    rtol, atol = NEAR[dtype]
    torch.testing.assert_close(found.output.float().cpu(), wanted[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(found.log_sum_exp.cpu(), wanted[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("dtype", "size", "group", "new"),
    [(dtype, *shape) for dtype in NEAR for shape in (SHAPES if dtype == torch.float32 else SHAPES[:2])],
)
@pytest.mark.parametrize("name", CODECS)
@torch.no_grad()
def test_every_head_is_answered_as_if_its_slots_were_written_out(name, dtype, size, group, new, place, anywhere):
    slots, sides = stored(CODECS[name], size, dtype, place)
    queries = torch.randn(len(COUNTS), HEADS * group, new, size).to(dtype).to(place)
    assert slots.fits(queries, SCALE)
    found = slots.attend(queries, SCALE)
    assert found.output.dtype == dtype
    assert found.log_sum_exp.dtype == torch.float32
    assert_near(found, written_out(queries, *sides, SCALE), dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("splits", [1, 2, 7, 64])
@torch.no_grad()
def test_any_number_of_programs_answers_the_same(splits, place, anywhere):
    slots, sides = stored(Dense(), 64, torch.float32, place)
    queries = torch.randn(len(COUNTS), HEADS, 1, 64, device=place)
    found = replace(slots, splits=splits).attend(queries, SCALE)
    assert_near(found, written_out(queries, *sides, SCALE), torch.float32)


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_large_scores_overflow_nothing_and_an_empty_head_weighs_nothing(place, anywhere):
    slots, (keys, values) = stored(Dense(), 64, torch.float32, place)
    start, _ = spans()[0][2]
    best = start + 70
    queries = 90 * keys[best].expand(len(COUNTS), HEADS, 1, 64)
    found = slots.attend(queries, 1.0)
    assert not found.output[0, 1].any()
    assert found.log_sum_exp[0, 1, 0] == -torch.inf
    torch.testing.assert_close(found.output[0, 2, 0], values[best])


def part_of(codec, counts, place, size=20):
    """A part that grew, so that it has room. No compiled kernel reads heads of 20, so this one is in nobody's way."""
    most = max(count for row in counts for count in row)
    shape = (len(counts), len(counts[0]), most)
    keys, values = (torch.randn(*shape, size).to(place) for _ in range(2))
    positions = torch.arange(most, device=place).expand(shape)
    kept = positions < torch.tensor(counts, device=place)[..., None]
    kv = KV(keys, values, positions)
    part = DensePart.of(kv, codec, kept=kept)
    return part.extend(DensePart.of(kv, codec, kept=kept), Transcript(), UNLIMITED)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("codec", "counts"),
    [(Dense(), COUNTS), (Int8(), COUNTS), (Int8(rotate=True), ((30, 30, 30),)), (Int4(), COUNTS)],
)
@torch.no_grad()
def test_a_part_is_attended_in_one_launch_as_block_by_block(codec, counts, place, anywhere):
    part = part_of(codec, counts, place)
    queries = torch.randn(len(counts), 2 * HEADS, 2, 20, device=place)
    assert part.room is not None
    assert part.flat is not None
    found, _ = part.attend(step_of(queries))
    object.__setattr__(part, "flat", None)
    wanted, _ = part.attend(step_of(queries))
    assert_near(found, (wanted.output.cpu(), wanted.log_sum_exp.cpu()), torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_the_kernel_is_for_few_queries_of_its_type_without_gradients_and_caps(place, anywhere):
    slots, _ = stored(Dense(), 8, torch.float16, place)
    coded, _ = stored(Int8(), 8, torch.float16, place)
    queries = torch.randn(2, HEADS, 4, 8, device=place)
    half = queries.half()
    assert slots.fits(half, SCALE)
    assert coded.fits(half, SCALE)
    assert coded.fits(queries, SCALE)
    assert not slots.fits(queries, SCALE)
    assert not slots.fits(half, CappedScale(SCALE, 5.0))
    assert not slots.fits(half.requires_grad_(), SCALE)
    assert not slots.fits(torch.randn(2, HEADS, 65, 8, device=place).half(), SCALE)
    assert part_of(Dense(), ((4, 4),), place).flat is None


def test_tensors_of_a_processor_go_another_way():
    assert part_of(Int8(), COUNTS, "cpu").flat is None


def test_programs_are_as_many_as_there_is_to_read_and_a_long_head_has_more_of_them():
    assert _splits([1, 5]) == 1
    assert _splits([100_000]) == ragged.PROGRAMS
    assert _splits([8192] * 8) == ragged.PROGRAMS / 8
    assert _splits([40_000, *[100] * 7]) > ragged.PROGRAMS / 8
    assert _splits([100_000, *[0] * 1055]) * 1056 <= 4 * ragged.PROGRAMS


@pytest.mark.slow
@starts_interpreter
def test_the_kernel_agrees_by_the_interpreter():
    assert_interpreted(__file__)


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "dtype", "size", "group"),
    [
        ("dense", torch.bfloat16, 256, 64), ("dense", torch.float16, 96, 3), ("dense", torch.float32, 256, 16),
        ("int8", torch.bfloat16, 128, 4), ("int8", torch.float16, 256, 64), ("int4", torch.bfloat16, 80, 8),
    ],
)  # fmt: skip
@torch.no_grad()
def test_cards_of_today_take_the_kernel(name, dtype, size, group, capability, anywhere, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    slots, _ = stored(CODECS[name], size, dtype, "cpu")
    kernel, recorder = ragged._attend, Recorder()
    monkeypatch.setattr(ragged, "_attend", recorder)
    queries = torch.randn(len(COUNTS), HEADS * group, 1, size).to(dtype)
    assert slots.fits(queries, SCALE)
    slots.attend(queries, SCALE)
    smallest = 99 << 10  # bytes of shared memory that a program may have on any of them
    assert compiled(kernel, recorder.given, capability).metadata.shared <= smallest
