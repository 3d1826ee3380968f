"""Rows are fitted beside what was folded before, also where that holds nothing."""

import torch

import kvfold
from driving import feed
from fakes import fresh, text
from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import register_adapter


def test_rows_are_fitted_beside_a_placed_part_without_slots():
    model, ids = fresh("llama"), text(1, 61)
    register_adapter(model, "sonic", lambda: Adapter.for_model(model, rank=2, rows=0))
    cache = kvfold.cache(model, "sonic(keep=0.5) + sentkv()", prompt_tokens=0, least=0)
    feed(model, ids[:, :3], cache)  # fewer than the sinks
    cache.fold()
    folded = [layer.state.folded for layer in cache.memory.layers.values()]
    assert all(part is not None and not part.slots for part in folded)
    feed(model, ids[:, 3:60], cache)
    cache.fold()
    assert cache.ledger().slots > 0
    assert bool(torch.isfinite(feed(model, ids[:, 60:], cache)).all())
