"""Sketches rank pages nearly as exact products do, take a sixteenth of a slot, and grow with the text."""

import shutil
from itertools import pairwise

import pytest
import torch

from kvfold.attention.kernels.compiled import lanes_of, sketch_products
from kvfold.encode.dense import Dense
from kvfold.memory.dense import DensePart
from kvfold.memory.kv import KV
from kvfold.memory.transcript import Transcript
from kvfold.place import page_index, sketch
from kvfold.place.page_index import PageIndex, minmax, sketched
from kvfold.place.sentkv import SentKV

SIZE, PAGES, LENGTH = 64, 60, 12
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


def some_keys(heads, slots, *, seed=0):
    """Keys that lie near a plane of half of the dimensions, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(9)))[0]
    sizes = 4 * 0.9 ** torch.arange(SIZE)
    return (torch.randn(heads, slots, SIZE, generator=generator) * sizes) @ basis.T + 3


def indexed(keys, lengths, form=sketched, index=None):
    """An index of some heads with keys [N, S, D], of pages with these lengths each."""
    index = PageIndex.empty(len(keys), torch.device("cpu")) if index is None else index
    joined = torch.cat([of_head[: sum(own)] for of_head, own in zip(keys, lengths, strict=True)])
    flat = torch.tensor([length for own in lengths for length in own])
    return index.extend(lengths, form(joined, flat))


def exactly(keys, queries, lengths):
    """The best share of any slot of each page, of any query."""
    shares = (queries @ keys[:, : sum(lengths)].mT / 8).log_softmax(dim=2).amax(dim=1)
    return torch.stack([piece.amax(dim=1) for piece in shares.split(lengths, dim=1)], dim=1)


@pytest.mark.parametrize("size", [8, 20, 64, 80, 128])
def test_a_sketch_has_half_of_the_dimensions_in_four_bits(size):
    keys = torch.randn(50, size)
    reference = sketch.fit(keys)
    codes = sketch.write(keys, reference)
    assert codes.dtype == torch.uint8
    assert codes.shape == (50, sketch.dimensions(size) // 2)
    assert len(reference) == 1 + sketch.dimensions(size)


def test_the_best_pages_are_those_of_exact_products_more_often_than_by_extremes():
    keys, queries = some_keys(2, PAGES * LENGTH), 0.6 * some_keys(2, 6, seed=1)
    lengths = [LENGTH] * PAGES
    true = exactly(keys, queries, lengths).topk(6, dim=1).indices
    found = {}
    for form in (sketched, minmax):
        best = indexed(keys, [lengths] * 2, form).rank(queries, None, scale=1 / 8).topk(6, dim=1).indices
        found[form] = sum(len({*one.tolist()} & {*other.tolist()}) for one, other in zip(true, best, strict=True))
    assert found[sketched] >= 8
    assert found[sketched] > found[minmax]


def test_queries_that_are_pads_ask_for_nothing():
    keys, queries = some_keys(1, 60), some_keys(1, 3, seed=2)
    index = indexed(keys, [[LENGTH] * 5])
    real = torch.tensor([[True, False, True]])
    assert torch.equal(index.rank(queries, real, scale=0.1), index.rank(queries[:, [0, 2]], None, scale=0.1))


def test_heads_with_fewer_pages_and_slots_rank_as_they_do_alone():
    keys, queries = some_keys(3, 80), some_keys(3, 4, seed=3)
    lengths = [[5, 9, 3], [12], [7, 7]]
    more = [[4], [6, 2], []]
    index = indexed(keys, lengths)
    rest = torch.cat([keys[0, 17:21], keys[1, 12:20]])
    index = index.extend(more, sketched(rest, torch.tensor([4, 6, 2])))
    scores = index.rank(queries, None, scale=0.1)
    for head, own in enumerate([[5, 9, 3, 4], [12, 6, 2], [7, 7]]):
        one = slice(head, head + 1)
        alone = PageIndex.empty(1, torch.device("cpu"), index.reference[one])
        alone = alone.extend([own], sketched(keys[head, : sum(own)], torch.tensor(own)))
        expected = alone.rank(queries[one], None, scale=0.1)[0]
        found = scores[head][index.sizes[head] > 0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert index.closed == (21, 20, 14)


def test_an_index_that_grew_is_that_of_the_whole_text():
    keys = some_keys(2, 90)
    grown = indexed(keys[:, :40], [[10, 20, 10]] * 2)
    fork = grown.extend([[2], [2]], sketched(keys[:, :2].flatten(0, 1), torch.tensor([2, 2])))
    grown = grown.extend([[25, 25]] * 2, sketched(keys[:, 40:].flatten(0, 1), torch.tensor([25] * 4)))
    whole = PageIndex.empty(2, torch.device("cpu"), grown.reference)
    whole = whole.extend(
        [[10, 20, 10, 25, 25]] * 2, sketched(keys.flatten(0, 1), torch.tensor([10, 20, 10, 25, 25] * 2))
    )
    for name, tensor in whole.tensors():
        assert torch.equal(tensor, dict(grown.tensors())[name]), name
    assert fork.sketches["codes"].shape[1] == 42


def test_keys_that_are_all_alike_or_alone_are_written_too():
    for keys in (torch.ones(5, SIZE), torch.ones(1, SIZE)):
        reference = sketch.fit(keys)
        assert bool(reference.isfinite().all())
        products = sketch.products(torch.randn(1, 2, SIZE), sketch.write(keys, reference)[None], reference[None])
        assert bool(products.isfinite().all())


@needs_compiler
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@torch.no_grad()
def test_the_compiled_kernel_multiplies_as_torch_does(size, monkeypatch):
    """33 slots are no whole vectors; the codes lie in a buffer with room for more."""
    keys = torch.randn(3, 33, size)
    reference = torch.stack([sketch.fit(of_head) for of_head in keys])
    room = torch.zeros(3, 50, sketch.dimensions(size) // 2, dtype=torch.uint8)
    for head, of_head in enumerate(keys):
        room[head, :33] = sketch.write(of_head, reference[head])
    queries, codes = torch.randn(3, 2, size), room[:, :33]
    asked = queries @ reference[:, 1:].mT
    found = sketch_products(asked, codes, size)
    assert (found is None) == (sketch.dimensions(size) // 2 % lanes_of(size) > 0)
    with_kernel = sketch.products(queries, codes, reference)
    monkeypatch.setattr(sketch, "sketch_products", lambda *given: None)
    torch.testing.assert_close(with_kernel, sketch.products(queries, codes, reference), atol=1e-4, rtol=1e-5)


def test_the_compiled_kernel_leaves_gradients_and_gaps_to_torch():
    codes = torch.zeros(1, 4, 16, dtype=torch.uint8)
    assert sketch_products(torch.randn(1, 2, 32), codes, 64) is None, "gradients are on"
    with torch.no_grad():
        assert sketch_products(torch.randn(1, 2, 32), torch.zeros(1, 4, 32, dtype=torch.uint8)[..., ::2], 64) is None


def placed(kv, *stops, part=None):
    """Slots that came in turns which end at these numbers of tokens, in pages of 8."""
    opened = SentKV(budget=60, length=8, window=0, recent=2).open(pinned=0)
    begin = 0 if part is None else part.counts[0][0]
    for first, stop in pairwise((begin, *stops)):
        turn = slice(first, stop)
        fresh = DensePart.of(KV(kv.keys[:, :, turn], kv.values[:, :, turn], kv.positions[:, :, turn]), Dense())
        part = opened.place(fresh, Transcript()) if part is None else part.extend(fresh, Transcript())
    return part


def some_slots(heads, tokens, *, seed=0):
    """Keys whose first 40 lie in other dimensions than the rest."""
    keys = some_keys(heads, tokens, seed=seed)
    keys[:, :40] = keys[:, :40].flip(2)
    return KV(keys[None], keys[None], torch.arange(tokens).expand(1, heads, -1))


def as_written(index, keys):
    """Whether the sketches of every head are those of its keys [N, S, D] by its reference."""
    wanted = [sketch.write(of_head, own) for of_head, own in zip(keys, index.reference, strict=True)]
    return torch.equal(index.sketches["codes"], torch.stack(wanted))


@pytest.mark.parametrize("stops", [(20, 720), (20, 120, 300, 720), (*range(24, 720, 24), 720)])
def test_a_short_first_turn_costs_no_recall(stops):
    kv, lengths = some_slots(2, 720), [8] * 90
    queries = 0.6 * some_keys(2, 6, seed=1)
    true = exactly(kv.keys[0], queries, lengths).topk(20, dim=1).indices

    def hits(part):
        best = part.table.index.rank(queries, None, scale=1 / 8).topk(20, dim=1).indices
        return sum(len({*one.tolist()} & {*other.tolist()}) for one, other in zip(true, best, strict=True))

    assert hits(placed(kv, *stops)) >= hits(placed(kv, 720)) - 2


def test_a_fork_reads_its_own_sketches_when_its_twin_is_measured_anew():
    kv, other = some_slots(2, 200), some_slots(2, 200, seed=4)
    base = placed(kv, 40)
    before = {name: tensor.clone() for name, tensor in base.table.index.tensors()}
    one, two = placed(kv, 104, 200, part=base), placed(other, 200, part=base)
    for name, tensor in base.table.index.tensors():
        assert torch.equal(tensor, before[name]), name
    assert as_written(one.table.index, kv.keys[0])
    assert as_written(two.table.index, torch.cat([kv.keys[0, :, :40], other.keys[0, :, 40:]], dim=1))


def test_heads_that_get_slots_later_are_measured_then():
    keys, lengths = some_keys(2, 80), [[8, 8], []]
    index = indexed(keys, lengths)
    assert index.unsettled([[8], [8]]) == {1}, "16 keys and 8 more have not doubled"
    assert index.unsettled([[8, 8], []]) == {0}
    grown = index.refitted({0: keys[0, :32], 1: keys[1, :16]})
    grown = grown.extend([[8, 8]] * 2, sketched(torch.cat([keys[0, 16:32], keys[1, :16]]), torch.tensor([8] * 4)))
    for head, count in enumerate((32, 16)):
        assert torch.equal(grown.reference[head], sketch.fit(keys[head, :count]))
        codes = grown.sketches["codes"][head][grown._are_slots()[head]]
        assert torch.equal(codes, sketch.write(keys[head, :count], grown.reference[head]))


def test_a_head_is_measured_few_times_and_no_more_once_there_is_enough(monkeypatch):
    kv, fits = some_slots(1, sketch.ENOUGH + 200), []
    monkeypatch.setattr(page_index, "fit", lambda keys: fits.append(len(keys)) or sketch.fit(keys))
    placed(kv, *range(16, sketch.ENOUGH + 200, 8))
    assert fits == [16, 32, 64, 128, 256, 512, 1024]


def test_an_index_that_is_built_again_keeps_its_reference():
    kv = some_slots(2, 200)
    part = placed(kv, 40, 200)
    again = part.take_rows([0])
    assert torch.equal(again.table.index.reference, part.table.index.reference)
    assert as_written(again.table.index, kv.keys[0])
