"""An offloaded part answers what its layout would answer on the device: dense, rounded or of few dimensions."""

import shutil

import pytest
import torch

import ranks
from kvfold.attention.kernels.compiled import decode
from kvfold.attention.partial import Partial
from kvfold.encode.dense import Dense
from kvfold.encode.int4 import Int4
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.memory.kv import KV
from kvfold.memory.part import Part
from kvfold.memory.step import AttentionStep, ForwardScope
from kvfold.memory.transcript import Transcript
from kvfold.place.sentkv import SentKV

ROWS, HEADS, SIZE = 2, 2, 8
TEXT = Transcript()


def memory(tokens, *, first=0):
    torch.manual_seed(first)
    positions = torch.arange(first, first + tokens).expand(ROWS, HEADS, -1)
    return KV(torch.randn(ROWS, HEADS, tokens, SIZE), torch.randn(ROWS, HEADS, tokens, SIZE), positions)


def low_rank(kv, **way):
    torch.manual_seed(5)
    form = ranks.form(HEADS, SIZE, **way)
    everything = torch.ones(kv.positions.shape, dtype=torch.bool)
    return LowRankPart.of(kv, everything, lambda keys, values, positions: positions.long() * 5 % 8, form)


def as_bytes(kv):
    return low_rank(kv, parts=HEADS, int8=True)


def rounded(kv):
    return Int4().pack(kv, torch.ones(kv.positions.shape, dtype=torch.bool))


def policy(budget=24):
    return SentKV(budget=budget, length=5, window=2, recent=2).open(pinned=0)


@pytest.mark.parametrize("made", [low_rank, as_bytes])
def test_latents_lie_on_disk_as_well(made, tmp_path):
    on_disk = SentKV(budget=24, length=5, window=2, recent=2, tier="disk", directory=str(tmp_path)).open(pinned=0)
    first, second, both = pieces(made)
    part, queries = on_disk.place(first, TEXT).extend(second, TEXT), torch.randn(ROWS, 4, 3, SIZE)
    assert near(answer(part, queries), answer(both, queries))


def answer(part: Part, queries: torch.Tensor) -> Partial:
    """What a part answers where nothing is to be selected anew."""
    return part.attend(AttentionStep(queries=queries, scale=0.3))[0]


def near(one: Partial, other: Partial) -> bool:
    return torch.allclose(one.output, other.output, atol=1e-5) and torch.allclose(
        one.log_sum_exp, other.log_sum_exp, atol=1e-5
    )


def pieces(made) -> tuple[Part, Part, Part]:
    """The first part, the second, and both as one."""
    first, second = made(memory(60)), made(memory(31, first=60))
    return first, second, made(memory(60)).extend(second, TEXT)


@pytest.mark.parametrize("made", [low_rank, as_bytes, rounded])
def test_everything_is_read_as_the_layout_reads_it(made):
    first, second, both = pieces(made)
    part, queries = policy().place(first, TEXT).extend(second, TEXT), torch.randn(ROWS, 4, 3, SIZE)
    assert near(answer(part, queries), answer(both, queries))
    for (name, one), (_, other) in zip(part.table.stored.whole(part.counts).tensors(), both.tensors(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(part.read().positions, both.read().positions)


@pytest.mark.parametrize("made", [low_rank, as_bytes, rounded])
def test_what_is_selected_is_fetched_and_nothing_else(made):
    first, second, both = pieces(made)
    part, queries = policy().place(first, TEXT).extend(second, TEXT), torch.randn(ROWS, 4, 1, SIZE)
    found, after = part.attend(AttentionStep(queries=queries, scale=0.3, forward=ForwardScope()))
    whole = both.read()
    slots = after.selection.slots.long().view(ROWS, HEADS, -1, 1).expand(-1, -1, -1, SIZE)
    keys, values = whole.keys.gather(2, slots), whole.values.gather(2, slots)
    scores = queries.view(ROWS, HEADS, 2, SIZE) @ keys.mT * 0.3
    assert torch.allclose(found.output.view(ROWS, HEADS, 2, SIZE), scores.softmax(-1) @ values, atol=1e-5)
    assert after.working.stats.fetched == 24 * ROWS * HEADS
    if made is low_rank:
        in_full = 24 * ROWS * HEADS * 2 * SIZE * 4
        assert after.working.stats.fetched_bytes < in_full * HEADS  # latents of all heads, fewer than in full


@pytest.mark.parametrize("made", [low_rank, as_bytes, rounded])
def test_rows_and_what_is_kept_lie_as_their_layout_would_have_them(made):
    first, second, both = pieces(made)
    part = policy().place(first, TEXT).extend(second, TEXT)
    queries = torch.randn(ROWS, 4, 2, SIZE)
    assert near(answer(part.take_rows([1, 0]), queries), answer(both.take_rows([1, 0]), queries))
    kept = torch.arange(91).repeat(ROWS * HEADS) % 3 > 0
    assert near(answer(part.keep(kept), queries), answer(both.keep(kept), queries))


def test_a_part_keeps_the_classes_of_its_text_and_no_ids():
    text = Transcript().with_ids(torch.zeros(ROWS, 60, dtype=torch.long))
    text = text.with_classes(torch.arange(60).expand(ROWS, -1), torch.ones(ROWS, 60, dtype=torch.uint8), None)
    part = policy().place(rounded(memory(60)), text)
    assert part.transcript.ids is None
    assert part.transcript.classes is text.classes
    assert "index.classes" in dict(part.tensors())


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@torch.no_grad()
def test_the_compiled_kernel_reads_what_is_selected_as_torch_does():
    everything = KV(
        *(side[..., :30, :] for side in (memory(60).keys, memory(60).values)), memory(60).positions[..., :30]
    )
    dense = Dense().pack(everything, torch.ones(everything.positions.shape, dtype=torch.bool))
    by_torch = by_kernel = policy().place(dense, TEXT)
    for token in range(12):
        step = AttentionStep(
            queries=torch.randn(ROWS, 4, 1, SIZE, generator=torch.Generator().manual_seed(token)),
            scale=0.3,
            forward=ForwardScope(),
        )
        wanted, by_torch = by_torch.attend(step)
        stored, by_kernel = by_kernel.stored_for(step)
        output, sums = decode(step.queries, [stored], heads=HEADS, scale=step.scale)
        assert near(Partial(output, sums), wanted)
        assert torch.equal(by_kernel.selection.slots, by_torch.selection.slots)
        assert by_kernel.selection.since == by_torch.selection.since
    assert by_kernel.working.stats.fetched == by_torch.working.stats.fetched
    uneven = dense.keep(torch.arange(dense.slots) != 3)
    assert policy().place(uneven, TEXT).stored_for(step)[0] is None, "a head with one slot less"
    assert by_kernel.stored_for(AttentionStep(queries=step.queries, scale=0.3))[0] is None, (
        "no forward: nothing is selected"
    )
