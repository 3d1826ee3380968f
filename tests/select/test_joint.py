"""Methods that fold all layers together: kvzip's shared budget, and the controls mean_pool and summary."""

import copy

import torch

import kvfold
from contexts import SharedDense, behind_a_pad, context_of
from driving import kept
from fakes import model_of, text
from kvfold.memory.context import FoldContext
from kvfold.select.chunkkv import ChunkKV
from kvfold.select.kvzip import KVzip
from kvfold.select.mean_pool import MeanPool
from kvfold.select.summary import Summary

IDS = [[0, 5, 40, 6, 41, 7, 42, 8, 9, 10, 11, 12, 13]]


class Scored(FoldContext):
    """A context whose recent queries attended as a test says."""

    __slots__ = ()
    scores = torch.zeros(1, 2, 3, 13)

    def query_scores(self):
        return self.scores


class Replayed:
    """A model that looks at columns as a test says while it reads the segment again."""

    adapter = None

    def __init__(self, scores):
        self.scores = scores

    def replay(self, states, text):
        return {layer: self.scores[:, layer] for layer in states}

    def run(self, states, rows):
        self.rows = rows
        made = torch.zeros(*rows.rows.shape, 4)[:, None].expand(-1, 3, -1, -1)
        return dict.fromkeys(states, (made, made))


def chosen(method, **more):
    """What a method chooses of one row of twelve tokens behind a pad, in two layers of three heads."""
    context = context_of(method, behind_a_pad(12), layers=2, heads=3, **more)
    selection = method.choose(context)
    assert list(selection.kept) == [0, 1]
    return selection, torch.stack([selection.kept[layer] for layer in (0, 1)], dim=1)


def test_kvzip_gives_a_head_that_is_looked_at_more_more_slots_and_keeps_the_newest():
    scores = torch.full((1, 2, 3, 13), 0.1) - torch.arange(13) * 1e-3
    scores[0, 1, 2] += 1.0
    selection, mask = chosen(KVzip(tokens=3), ids=IDS, access=Replayed(scores))
    counts = mask[0].sum(dim=-1)
    assert int(counts.sum()) == 3 * 2 * 3
    assert int(counts[1, 2]) == 12
    assert mask[..., -1].all()
    assert not mask[..., 0].any()  # the pad
    assert not selection.made


def test_kvzip_keeps_the_same_slots_for_all_heads_where_they_share_them():
    scores = torch.rand(1, 2, 3, 13)
    _, mask = chosen(KVzip(tokens=3), ids=IDS, access=Replayed(scores), layout=SharedDense())
    assert (mask == mask[:, :, :1]).all()
    assert int(mask.sum()) == 3 * 2 * 3


def test_chunkkv_keeps_what_any_layer_looks_at_with_its_neighbours_in_every_layer(monkeypatch):
    scores = torch.zeros(1, 2, 3, 13)
    scores[0, 1, 2, 5] = 1.0  # one head of one layer; column 0 is a pad, so that this is the fifth token
    monkeypatch.setattr(Scored, "scores", scores)
    selection, mask = chosen(ChunkKV(tokens=7, window=2, pool=1, reach=2), kind=Scored)
    assert (mask == mask[:, :1, :1]).all()
    assert mask[0, 0, 0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 11, 12]
    _, fewer = chosen(ChunkKV(tokens=4, window=2, pool=1, reach=2), kind=Scored)
    assert fewer[0, 0, 0].nonzero().flatten().tolist() == [4, 5, 11, 12]
    assert not selection.made


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
    method = MeanPool(tokens=3)
    context = context_of(method, behind_a_pad(12), layers=2, heads=3)
    selection = method.choose(context)
    assert not any(mask.any() for mask in selection.kept.values())
    assert all(there.tolist() == [[[True] * 3] * 3] for there in selection.made_kept.values())
    for layer, made in selection.made.items():
        kv = context.keys_values(layer)
        assert made.positions.tolist() == [[[3, 7, 11]] * 3]
        assert torch.allclose(made.keys, kv.keys[:, :, 1:].unflatten(2, (3, 4)).mean(dim=3), atol=1e-6)
        assert torch.allclose(made.values, kv.values[:, :, 1:].unflatten(2, (3, 4)).mean(dim=3), atol=1e-6)


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
    model = Replayed(None)
    selection, mask = chosen(Summary(tokens=3), ids=IDS, access=model)
    assert model.rows.ids.tolist() == [[40, 41, 42]]
    assert model.rows.positions.tolist() == [[1, 3, 5]]
    assert not model.rows.stop.any()  # nothing of the segment is seen
    assert not mask.any()
    assert all(there.all() for there in selection.made_kept.values())


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
