"""Attention over latents, against attention over what the bases read back."""

from dataclasses import replace

import pytest
import torch

from cards import CAPABILITIES, PLACES, Recorder, assert_interpreted, compiled, needs_compiler, starts_interpreter
from fakes import model_of
from kvfold.attention import low_rank
from kvfold.attention.basis import Bases, Basis, LatentBlock
from kvfold.attention.kernels import low_rank as kernels
from kvfold.attention.kernels.low_rank import attend_rows, fits
from kvfold.attention.low_rank import LatentView, attend_latents
from kvfold.attention.reference import attend_part
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.hf.rotary import rotary_of
from kvfold.memory.kv import KV
from kvfold.memory.room import UNLIMITED
from kvfold.memory.step import AttentionStep
from kvfold.memory.transcript import Transcript
from ranks import form

HEADS, SIZE, SCALE = 2, 8, 0.3


def blocks_of(own, counts, dtype=torch.float32):
    """Random slots, so many of each level."""
    start, found = 0, []
    for count, (keys, values) in zip(counts, own.levels, strict=True):
        positions = torch.arange(start, start + count, dtype=torch.int32)
        found.append(
            LatentBlock(
                keys=torch.randn(count, keys).to(dtype),
                values=torch.randn(count, values).to(dtype),
                positions=positions,
            )
        )
        start += count
    return [block for block in found if len(block.positions)]


def as_stored(block, bases):
    keys, values = (
        side.unflattened(side.flattened(numbers), *numbers.shape)
        for side, numbers in ((bases.keys, block.keys), (bases.values, block.values))
    )
    assert torch.equal(keys, block.keys)
    assert torch.equal(values, block.values)
    return LatentBlock(keys=keys, values=values, positions=block.positions)


def read_back(blocks, bases):
    keys = torch.cat([bases.read_keys(block) for block in blocks]).transpose(0, 1)[None]
    values = torch.cat([bases.read_values(block) for block in blocks]).transpose(0, 1)[None]
    return keys, values


@pytest.mark.parametrize("laid", [False, True])
@pytest.mark.parametrize("parts", [1, HEADS])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_over_ragged_latents_is_that_over_what_they_read_back_as(turned, dtype, parts, laid):
    own = form(HEADS, SIZE, rotary=rotary_of(model_of("llama")) if turned else None, parts=parts)
    blocks = blocks_of(own, [3, 0, 5, 1, 2, 0, 4, 7], dtype)
    if laid:
        blocks = [as_stored(block, own.bases) for block in blocks]
    queries = torch.randn(6, 5, SIZE).to(dtype)
    found = attend_latents(queries, [LatentView.of(block, own.bases) for block in blocks], own.bases, scale=SCALE)
    keys, values = read_back(blocks, own.bases)
    output, weights = attend_part(queries[None].float(), keys.float(), values.float(), scale=SCALE)
    close = 3e-2 if dtype == torch.bfloat16 else 1e-4
    assert found.output.dtype == dtype
    assert (found.output.float() - output).abs().max() < close * output.abs().max()
    assert (found.log_sum_exp.float() - weights).abs().max() < close * weights.abs().max()


@pytest.mark.parametrize("parts", [1, HEADS])
def test_many_queries_are_answered_in_pieces_as_in_one(parts):
    own = form(HEADS, SIZE, parts=parts)
    blocks, queries = blocks_of(own, [0, 0, 9, 9, 9, 9, 9, 9]), torch.randn(4, 300, SIZE)
    whole = attend_latents(queries, [LatentView.of(block, own.bases) for block in blocks], own.bases, scale=SCALE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "_SCORES", 64)
        patch.setattr(low_rank, "_TILE", 4)
        patch.setattr(low_rank, "_WIDE_TILE", 4)
        pieces = attend_latents(queries, [LatentView.of(block, own.bases) for block in blocks], own.bases, scale=SCALE)
    assert torch.allclose(whole.output, pieces.output, rtol=1e-4, atol=1e-5)
    assert torch.allclose(whole.log_sum_exp, pieces.log_sum_exp, rtol=1e-4, atol=1e-5)


def moved(basis, device):
    return Basis(encode=basis.encode.to(device), decode=basis.decode.to(device), mean=basis.mean.to(device))


def part_of(own, *, dtype, device, rows=3, slots=700):
    """Random slots in random levels; the last row has few."""
    keys, values = (torch.randn(rows, HEADS, slots, SIZE, device=device).to(dtype) for _ in range(2))
    positions = torch.arange(slots, device=device).expand(rows, HEADS, slots)
    kept = torch.rand(rows, 1, slots, device=device) < torch.tensor([0.9, 0.5, 0.01], device=device)[:, None, None]

    def deal(keys, values, positions):
        return torch.randint(0, len(own.levels), (len(keys),), device=keys.device)

    return LowRankPart.of(KV(keys, values, positions), kept.expand(rows, HEADS, slots), deal, own)


def kernel_and_blocks(device, dtype, parts, int8):
    """What the kernel answers, and what the blocks answer to the same queries, wider; the blocks have room."""
    own = form(HEADS, SIZE, parts=parts, int8=int8)
    own = replace(own, bases=Bases(keys=moved(own.bases.keys, device), values=moved(own.bases.values, device)))
    part = part_of(own, dtype=dtype, device=device)
    part = part.extend(part_of(own, dtype=dtype, device=device, slots=90), Transcript(), UNLIMITED)
    assert part.room is not None
    queries = torch.randn(3, 6, 2, SIZE, device=device).to(dtype)
    dims = torch.tensor(own.levels, dtype=torch.int32, device=device)
    found = attend_rows(
        queries, own.bases, keys=part.keys, values=part.values, scales=part.scales, held=part.held, room=part.room,
        dims=dims, slots=int(part.held.sum(dim=1).max()), scale=SCALE,
    )  # fmt: skip
    return found, part.attend(AttentionStep(queries=queries.float(), scale=SCALE))[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("parts", [1, HEADS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_answers_for_all_rows_and_levels_what_the_blocks_answer(dtype, parts, int8, place):
    found, wanted = kernel_and_blocks(place, dtype, parts, int8)
    close = 0.03 if dtype == torch.bfloat16 else 0.005
    assert found.output.dtype == dtype
    assert (found.output.float() - wanted.output).abs().max() < close * wanted.output.abs().max()
    assert (found.log_sum_exp - wanted.log_sum_exp).abs().max() < close * wanted.log_sum_exp.abs().max()


@pytest.mark.slow
@starts_interpreter
def test_the_kernel_agrees_by_the_interpreter():
    assert_interpreted(__file__)


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("parts", [1, HEADS])
def test_cards_of_today_take_the_kernel(parts, int8, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, recorder = kernels._attend, Recorder()
    monkeypatch.setattr(kernels, "_attend", recorder)
    kernel_and_blocks("cpu", torch.bfloat16, parts, int8)
    compiled(kernel, recorder.given, capability)


def test_the_kernel_is_not_for_other_devices_types_and_bases():
    own = form(HEADS, SIZE)
    assert not fits(torch.randn(1, 2, 1, SIZE).half(), own.bases, 1.0)


@pytest.mark.parametrize("parts", [1, HEADS])
def test_many_slots_of_float16_overflow_no_sum(parts):
    own = form(HEADS, SIZE, parts=parts)
    slots = 20000
    keys, values = own.levels[-1]
    block = LatentBlock(
        keys=torch.zeros(slots, keys).half(),
        values=torch.full((slots, values), 4.0).half(),
        positions=torch.arange(slots, dtype=torch.int32),
    )
    found = attend_latents(torch.zeros(4, 2, SIZE).half(), [LatentView.of(block, own.bases)], own.bases, scale=SCALE)
    one = own.bases.read_values(block.tile(0, 1))[0].float()  # H D; all slots are alike
    torch.testing.assert_close(
        found.output[0].float(), one.repeat_interleave(2, dim=0)[:, None].expand(4, 2, SIZE), rtol=1e-2, atol=1e-2
    )
