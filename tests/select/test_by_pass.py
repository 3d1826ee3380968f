"""Methods that fold all layers together: kvzip's shared budget, and the controls mean_pool and summary."""

import copy

import torch
from kvfold.memory.request import Segment

import kvfold
from driving import kept
from fakes import model_of, text
from kvfold.select.chunkkv import ChunkKV
from kvfold.select.kvzip import KVzip
from kvfold.select.mean_pool import MeanPool
from kvfold.select.summary import Summary


def segment(tokens=12, *, slots, **more):
    """One row of tokens behind a pad, two layers of three heads."""
    real = torch.ones(1, tokens + 1, dtype=torch.bool)
    real[0, 0] = False
    positions = torch.arange(-1, tokens)[None]
    return Segment(real=real, positions=positions, slots=(slots,), layers=2, heads=3, **more)


def test_kvzip_gives_a_head_that_is_looked_at_more_more_slots_and_keeps_the_newest():
    worth = torch.full((1, 2, 3, 13), 0.1) - torch.arange(13) * 1e-3
    worth[0, 1, 2] += 1.0
    request = KVzip(tokens=5).request(segment(slots=3, worth=worth))
    counts = request.kept[0].sum(dim=-1)
    assert int(counts.sum()) == 3 * 2 * 3
    assert int(counts[1, 2]) == 12
    assert request.kept[..., -1].all()
    assert not request.kept[..., 0].any()  # the pad
    assert not request.real.any()


def test_kvzip_keeps_the_same_slots_for_all_heads_where_they_share_them():
    request = KVzip(tokens=5).request(segment(slots=3, worth=torch.rand(1, 2, 3, 13), together=True))
    assert (request.kept == request.kept[:, :, :1]).all()
    assert int(request.kept.sum()) == 3 * 2 * 3


def test_chunkkv_keeps_what_any_layer_looks_at_with_its_neighbours_in_every_layer():
    worth = torch.zeros(1, 2, 3, 13)
    worth[0, 1, 2, 5] = 1.0  # one head of one layer; column 0 is a pad, so that this is the fifth token
    request = ChunkKV(tokens=8, window=2, pool=1, reach=2).request(segment(slots=7, worth=worth))
    assert (request.kept == request.kept[:, :1, :1]).all()
    assert request.kept[0, 0, 0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 11, 12]
    fewer = ChunkKV(tokens=8, window=2, pool=1, reach=2).request(segment(slots=4, worth=worth))
    assert fewer.kept[0, 0, 0].nonzero().flatten().tolist() == [4, 5, 11, 12]
    assert not request.real.any()


def test_chunkkv_goes_by_the_attention_of_the_newest_queries():
    model, ids = model_of("llama"), text(1, 40, seed=6)
    cache = kvfold.cache(model, "chunkkv(tokens=14, window=3, pool=1, reach=0)", prompt_tokens=0)
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        weights = torch.stack(twin(ids, output_attentions=True).attentions)  # layers 1 heads queries slots
    cache.fold()
    best = weights[:, 0, :, -3:, 4:37].amax(dim=(0, 1, 2)).sort(descending=True).indices[: 14 - 4 - 3] + 4
    wanted = sorted([*range(4), *best.tolist(), 37, 38, 39])
    assert all(head == wanted for row in kept(cache).values() for heads in row for head in heads)


def test_mean_pool_makes_means_of_equal_stretches():
    request = MeanPool(tokens=5).request(segment(slots=3))
    assert request.pooled
    assert request.first.tolist() == [[1, 5, 9]]
    assert request.stop.tolist() == [[5, 9, 13]]
    assert request.positions.tolist() == [[3, 7, 11]]


def test_pooled_slots_are_the_means_of_their_tokens():
    model, ids = model_of("llama"), text(1, 28, seed=3)
    raw, cache = (kvfold.cache(model, plan, prompt_tokens=0) for plan in ("full", "mean_pool(tokens=10)"))
    with torch.no_grad():
        for past in (raw, cache):
            model(ids, past_key_values=past)
    cache.fold()
    for index, layer in cache.memory.layers.items():
        tail, folded = raw.memory.layers[index].state.tail, layer.state.folded
        wanted = tail.keys[:, :, 4:28].unflatten(2, (6, 4)).mean(dim=3)  # four sinks, then six stretches of four
        torch.testing.assert_close(folded.payload["keys"].view(wanted.shape), wanted, rtol=1e-5, atol=1e-5)


def test_a_summary_is_the_rarest_tokens_and_nothing_else_of_the_segment_is_left():
    ids = torch.tensor([[0, 5, 40, 6, 41, 7, 42, 8, 9, 10, 11, 12, 13]])
    request = Summary(tokens=5).request(segment(slots=3, ids=ids))
    assert request.ids.tolist() == [[40, 41, 42]]
    assert request.positions.tolist() == [[1, 3, 5]]
    assert not request.stop.any()  # nothing of the segment is seen


def test_changing_a_token_that_a_summary_drops_changes_nothing_later():
    model, more = model_of("llama"), text(1, 5, seed=9)
    ids = text(1, 30, seed=1).clamp(max=60)
    ids[0, [8, 15, 22]] = torch.tensor([80, 81, 82])
    other, answers = ids.clone(), []
    other[0, 12] = 3
    for own in (ids, other):
        cache = kvfold.cache(model, "summary(tokens=7)", prompt_tokens=0)
        with torch.no_grad():
            model(own, past_key_values=cache)
            cache.fold()
            answers.append(model(more, past_key_values=cache).logits)
    assert torch.equal(*answers)
