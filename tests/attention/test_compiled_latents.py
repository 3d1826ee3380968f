"""The compiled decode step over latents, against attention over what the bases read back, written out."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch

import kvfold
from driving import feed
from fakes import model_of, text
from kvfold.adapters.files import register_adapter
from kvfold.attention.basis import Bases, LatentBlock
from kvfold.attention.bit_planes import BitPlanes
from kvfold.attention.kernels import compiled
from kvfold.attention.kernels.compiled import decode
from kvfold.attention.kernels.latents import StoredLatents
from kvfold.attention.reference import attend_part
from kvfold.attention.rotary import Rotary
from kvfold.attention.soft_cap import CappedScale
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.memory.kv import KV
from kvfold.memory.room import UNLIMITED
from kvfold.memory.step import AttentionStep
from kvfold.memory.transcript import Transcript
from ranks import basis, form, ranks_for

HEADS, GROUP, SCALE = 3, 3, 0.3
KINDS = ("joint", "rotated", "apart")  # keys before rotation; as scored; as scored, each head by itself
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


def rotary(rotated):
    def angles(positions):
        steps = positions[:, None] * 10000.0 ** -(torch.arange(rotated // 2) / (rotated // 2))
        both = torch.cat([steps, steps], dim=1)
        return both.cos(), both.sin()

    return Rotary(angles=angles)


def form_of(kind, size, *, int8=False, rotated=None):
    turns = rotary(rotated or size) if kind == "joint" else None
    return form(HEADS, size, rotary=turns, parts=HEADS if kind == "apart" else 1, int8=int8)


def part_of(own, size, *, dtype=torch.float32, rows=2, slots=300, first=0, seed=0):
    """Random slots in random levels; the second row has few."""
    source = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, HEADS, slots, size, generator=source).to(dtype) for _ in range(2))
    positions = torch.arange(first, first + slots).expand(rows, HEADS, slots)
    share = torch.tensor([0.9, 0.05])[:rows, None, None]
    kept = torch.rand(rows, 1, slots, generator=source) < share

    def allocate(keys, values, positions):
        return torch.randint(0, len(own.levels), (len(keys),), generator=source)

    return LowRankPart.of(KV(keys, values, positions), kept.expand(rows, HEADS, slots), allocate, own)


def written_out(queries, part, row):
    """The oracle: keys and values that the bases read back in float32, attended slot by slot."""
    bases, blocks = part.form.bases, [block for block in part.blocks[row] if len(block.positions)]
    keys = torch.cat([bases.read_keys(block) for block in blocks]).transpose(0, 1)[None].float()
    values = torch.cat([bases.read_values(block) for block in blocks]).transpose(0, 1)[None].float()
    return attend_part(queries[row : row + 1].float(), keys, values, scale=SCALE, mask=None)


def check(part, size, *, dtype=torch.float32, near=1e-4):
    queries = torch.randn(len(part.counts), HEADS * GROUP, 1, size, generator=torch.Generator().manual_seed(9))
    queries = queries.to(dtype)
    assert part.stored is not None
    read = decode(queries, [part.stored], heads=HEADS, scale=SCALE)
    assert read is not None
    for row in range(len(part.counts)):
        output, sums = written_out(queries, part, row)
        assert (read[0][row].float() - output[0]).abs().max() < near * output.abs().max()
        assert (read[1][row] - sums[0]).abs().max() < near * sums.abs().max()
    return queries, read


@pytest.mark.parametrize("size", [8, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_of_every_basis_are_attended_as_if_written_out(kind, dtype, size):
    part = part_of(form_of(kind, size), size, dtype=dtype)
    check(part, size, dtype=dtype, near=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_that_grew_into_room_are_attended_too(kind, int8):
    own = form_of(kind, 16, int8=int8)
    part = part_of(own, 16)
    for turn in range(3):
        part = part.extend(part_of(own, 16, slots=40, first=300 + 40 * turn, seed=turn + 1), Transcript(), UNLIMITED)
    assert part.room is not None
    queries, read = check(part, 16)
    torch.testing.assert_close(decode(queries, [copy.deepcopy(part.stored)], heads=HEADS, scale=SCALE), read)


@torch.no_grad()
def test_only_the_first_dimensions_of_a_head_may_be_rotated():
    check(part_of(form_of("joint", 32, rotated=16), 32), 32)


@pytest.mark.parametrize("kind", ["joint", "rotated"])
@torch.no_grad()
def test_bit_planes_are_read_as_they_are_unpacked(kind):
    size, slots = 16, 77
    sides = [basis(HEADS * size, HEADS) for _ in range(2)]
    bases = Bases(keys=sides[0], values=sides[1], rotary=rotary(size) if kind == "joint" else None)
    generator = torch.Generator().manual_seed(3)
    widths = [[8, 0, 4, 3, 6, 5, 2] * 6, [4] * 30 + [0, 2] * 9]
    planes = tuple(BitPlanes.of(bits, torch.rand(HEADS * size, generator=generator) + 0.5) for bits in widths)
    latents = [torch.randn(slots, HEADS * size, generator=generator) for _ in range(2)]
    (keys, key_scales), (values, value_scales) = (
        side.pack(numbers) for side, numbers in zip(planes, latents, strict=True)
    )
    block = LatentBlock(
        keys=keys,
        values=values,
        positions=torch.arange(slots, dtype=torch.int32),
        scales=torch.stack([key_scales, value_scales], dim=1),
        planes=(planes[0], planes[1]),
    )
    queries = torch.randn(1, HEADS * GROUP, 1, size, generator=generator)
    stored = StoredLatents.of([[block]], bases)
    assert stored is not None
    output, sums = decode(queries, [stored], heads=HEADS, scale=SCALE)
    back = [side.transpose(0, 1)[None] for side in (bases.read_keys(block), bases.read_values(block))]
    wanted, wanted_sums = attend_part(queries, *back, scale=SCALE, mask=None)
    torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_more_threads_say_the_same(monkeypatch):
    monkeypatch.setattr(compiled, "_SHARED_SLOTS", 1)
    before = torch.get_num_threads()
    for kind in KINDS:
        part, found = part_of(form_of(kind, 16), 16), []
        queries = torch.randn(2, HEADS * GROUP, 1, 16)
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(decode(queries, [part.stored], heads=HEADS, scale=SCALE))
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[0], found[2])


@torch.no_grad()
def test_what_the_kernel_does_not_read_is_left_to_torch():
    part = part_of(form_of("rotated", 16), 16)
    queries = torch.randn(2, HEADS * GROUP, 1, 16)
    assert decode(queries, [part.stored], heads=HEADS, scale=CappedScale(SCALE, 5.0)) is None
    capped = part.attend(AttentionStep(queries=queries, scale=CappedScale(SCALE, 5.0)))[0]
    assert capped.output.isfinite().all()
    assert part_of(form_of("rotated", 16), 16, dtype=torch.float64).stored is None
    assert part_of(form_of("rotated", 20), 20).stored is None, "20 is no multiple of 8"


@pytest.mark.parametrize(
    "plan",
    ["dynakv(rate=0.5)", "dynakv(rate=0.4, basis='joint')", "dynakv(rate=0.4, int8=True)", "kvtc(bits=4)",
     "snapkv(tokens=20) + dynakv(rate=0.5)", "dynakv(rate=0.5) + sentkv(budget=0.3)"],
)  # fmt: skip
def test_a_model_says_the_same_with_and_without_the_kernel(plan, monkeypatch):
    model, ids = model_of("llama"), text(2, 60)
    register_adapter(model, "dynakv", lambda: ranks_for(model))

    def said():
        cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
        feed(model, ids[:, :50], cache)
        cache.fold()
        return torch.cat([feed(model, ids[:, at : at + 1], cache) for at in range(50, 60)], dim=1)

    fast = said()
    monkeypatch.setenv("KVFOLD_KERNELS", "off")
    compiled._kernel.cache_clear()
    try:
        slow = said()
    finally:
        compiled._kernel.cache_clear()
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4)


_AT_THE_END = """
import ctypes, mmap, sys, torch
from kvfold.attention.basis import Bases, Basis, LatentBlock
from kvfold.attention.kernels.compiled import decode
from kvfold.attention.kernels.latents import StoredLatents

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p

def at_end(numbers):  # a tensor behind which lies a page that nobody may read
    page, own = mmap.PAGESIZE, -(-numbers.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    start = libc.mmap(None, ctypes.c_size_t(own + page), 3, 0x22, -1, ctypes.c_long(0))
    assert libc.mprotect(ctypes.c_void_p(start + own), ctypes.c_size_t(page), 0) == 0
    there = (ctypes.c_char * numbers.nbytes).from_address(start + own - numbers.nbytes)
    tensor = torch.frombuffer(there, dtype=numbers.dtype).view(numbers.shape)
    return tensor.copy_(numbers)

size, slots = 32, 33
whole = Basis(encode=torch.eye(size)[None], decode=torch.eye(size)[None].contiguous(), mean=torch.zeros(size))
torch.set_grad_enabled(False)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for width in (1, 2, 7, 16, 17):
        keys, values = (at_end(torch.randn(slots, width).to(dtype)) for _ in range(2))
        block = LatentBlock(keys=keys, values=values, positions=torch.arange(slots).int())
        stored = StoredLatents.of([[block]], Bases(keys=whole, values=whole))
        assert decode(torch.randn(1, 1, 1, size), [stored], heads=1, scale=0.1)[0].isfinite().all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded by Linux's numbers")
def test_nothing_behind_the_last_slot_is_read():
    ran = subprocess.run([sys.executable, "-c", _AT_THE_END], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
