"""What tests of captured steps share: pairs of caches, one fed by captured steps, and how they are compared."""

from dataclasses import replace

import torch

import kvfold
from driving import close, feed, kept
from tape import Tape

LOSSLESS = (
    "full",
    "none",
    "streaming_llm(tokens=20)",
    "snapkv(tokens=20)",
    "h2o(tokens=20)",
    "chunkkv(tokens=20)",
    "kvzip(tokens=20)",
    "mean_pool(tokens=20)",
)
LOSSY = ("int8", "int8(rotate=True)", "int4", "int2", "snapkv(tokens=20) + int4")
SETTINGS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
PROMPT, TOKENS = 26, 48


def caches(model, plan, ids, **more):
    """Two caches of one plan that have read the prompt."""
    pair = [kvfold.cache(model, plan, **{"stride": 10, "least": 0} | more) for _ in range(2)]
    for cache in pair:
        feed(model, ids[:, :PROMPT], cache)
    return pair


def said(model, plan, ids, *, room=16, graph=Tape, **more):
    """Two caches after some tokens, one captured, with the logits of both and the captured step."""
    usual, other = caches(model, plan, ids, **more)
    decode = kvfold.captured(model, other, room=room, graph=graph)
    wanted = feed(model, ids[:, PROMPT:], usual, sizes=(1,) * (ids.shape[1] - PROMPT))
    found = [decode.step(ids[:, at : at + 1]) for at in range(PROMPT, ids.shape[1])]
    return usual, other, wanted, torch.stack(found, dim=1), decode


def held(cache):
    """What is held, apart from room for tokens to come."""
    ledger = cache.ledger()
    lines = [replace(line, stored_bytes=line.stored_bytes - line.slack_bytes, slack_bytes=0) for line in ledger.parts]
    taken = {name: getattr(ledger, name) - ledger.slack_bytes for name in ("stored_bytes", "resident_bytes")}
    return replace(ledger, parts=tuple(lines), slack_bytes=0, **taken)


def records(cache):
    """Every record of every layer, with all tokens seen, and how many tokens waited."""
    for layer in cache.memory.layers.values():
        pending = layer.state.pending
        yield "waiting", torch.tensor(0 if pending is None else len(pending.queries))
        for name, record in layer.state.records.items():
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in record.tensors())


def alike(one, other):
    """Whether two caches hold the same, up to rounding."""
    assert held(one) == held(other)
    assert kept(one) == kept(other)
    assert (one.memory.fed, one.memory.seen) == (other.memory.fed, other.memory.seen)
    assert one.memory.transcript.digest == other.memory.transcript.digest
    pairs = list(zip(records(one), records(other), strict=True))
    return all(name == wanted and same(found, said) for (name, found), (wanted, said) in pairs)


def same(found, wanted):
    """Whether two tensors are close, or both empty."""
    return found.shape == wanted.shape and (found.numel() == 0 or close(found, wanted))
