"""Tokens that wait for the records: whoever asks for records gets them as if none had waited."""

import pytest
import torch

import kvfold
from driving import feed
from fakes import model_of, text
from kvfold.memory import layer
from kvfold.memory.pending import MOST

PLANS = ("snapkv(keep=0.5)", "h2o(keep=0.5)")


def said_one_by_one(plan, tokens, monkeypatch, *, waits, read=20):
    """A cache that read a text and was said tokens one by one; with `waits` False each is recorded at once."""
    model, ids = model_of("llama"), text(2, read + tokens)
    if not waits:
        monkeypatch.setattr(layer.PendingTokens, "is_full", True)
    cache = kvfold.cache(model, plan, prompt_tokens=0, least=0)
    feed(model, ids[:, :read], cache)
    for at in range(read, read + tokens):
        feed(model, ids[:, at : at + 1], cache)
    monkeypatch.undo()
    return cache


def states(cache):
    return [one.state for one in cache.memory.layers.values()]


def same_records(one, other):
    for first, second in zip(states(one), states(other), strict=True):
        assert first.records.keys() == second.records.keys()
        for name, record in first.records.items():
            for (tensor_name, found), (_, wanted) in zip(record.tensors(), second.records[name].tensors(), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=f"{name}.{tensor_name}")


@pytest.mark.parametrize("tokens", [1, MOST - 1, MOST, MOST + 3])
@pytest.mark.parametrize("plan", PLANS)
def test_records_are_those_of_tokens_that_did_not_wait(plan, tokens, monkeypatch):
    waited = said_one_by_one(plan, tokens, monkeypatch, waits=True)
    at_once = said_one_by_one(plan, tokens, monkeypatch, waits=False)
    assert all(state.pending is None for state in states(at_once))
    assert all((state.pending is None) == (tokens % MOST == 0) for state in states(waited))
    same_records(waited, at_once)
    for cache in (waited, at_once):
        cache.fold()
    same_records(waited, at_once)
    for one, other in zip(states(waited), states(at_once), strict=True):
        assert torch.equal(one.folded.read().positions, other.folded.read().positions)


def test_a_crop_forgets_tokens_that_wait(monkeypatch):
    cache = said_one_by_one("snapkv(keep=0.5)", 7, monkeypatch, waits=True)
    cache.crop(-3)
    shorter = said_one_by_one("snapkv(keep=0.5)", 4, monkeypatch, waits=True)
    for one, other in zip(states(cache), states(shorter), strict=True):
        newest = other.records["window"].positions
        assert torch.equal(one.records["window"].positions[:, -newest.shape[1] :], newest)


def test_what_waits_is_counted_and_leaves_with_the_fold(monkeypatch):
    cache = said_one_by_one("h2o(keep=0.5)", 5, monkeypatch, waits=True)
    line = next(line for line in cache.ledger().parts if line.name == "pending")
    held = [tensor for state in states(cache) for _, tensor in state.pending.tensors()]
    assert line.stored_bytes == sum(tensor.nbytes for tensor in held)
    cache.fold()
    assert all(state.pending is None for state in states(cache))


def test_a_mark_from_before_is_gone_back_to(monkeypatch):
    cache = said_one_by_one("h2o(keep=0.5)", 3, monkeypatch, waits=True)
    wanted = [state.records["attention_sums"].raw.clone() for state in states(cache)]
    mark = cache.memory.mark()
    model, ids = model_of("llama"), text(2, 40)
    for at in range(23, 33):
        feed(model, ids[:, at : at + 1], cache)
    cache.memory.restore(mark)
    for state, raw in zip(states(cache), wanted, strict=True):
        torch.testing.assert_close(state.records["attention_sums"].raw, raw)
