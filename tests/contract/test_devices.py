"""Every member runs on a device that is not the processor, and says there what it says on the processor.

A pretended device finds tensors that were made in the wrong place; a real one, where there is one, runs the kernels.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import captures
import kvfold
from driving import close, error, feed
from fakes import model_of, text
from plans import lossless, lossy, mostly, pairs
from tape import Tape

PLANS = lossless() | lossy() | pairs()
SIZES = (20, 1, 1, 5, 1)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
KINDS = [GPU] if torch.cuda.is_available() else ["away", GPU]


@contextmanager
def elsewhere(kind: str, family: str) -> Iterator[tuple[torch.nn.Module, torch.device]]:
    """The family's model on a device, and the device."""
    if kind == "cuda":
        yield copy.deepcopy(model_of(family)).cuda(), torch.device("cuda:0")
        return
    from away import AWAY, Away

    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Away():
            yield copy.deepcopy(model_of(family)).to(AWAY), AWAY
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def said(model, plan, ids, mask=None):
    """Logits of a prompt in pieces, of tokens after a fold and of two forks, and the bytes that are held."""
    cache = kvfold.cache(model, plan, stride=6, least=0)

    def seen(stop):
        return None if mask is None else mask[:, :stop]

    found = [feed(model, ids[:, :32], cache, mask=seen(32), sizes=SIZES)]
    cache.fold()
    found += [feed(model, ids[:, at : at + 1], cache, mask=seen(at + 1)) for at in (32, 33)]
    found += [feed(model, ids[:, 34:], each, mask=mask) for each in (cache, cache.fork())]
    return torch.cat(found, dim=1).cpu(), cache.ledger()


def alike(found, wanted, plan):
    """As exact as float32; but codes may round the other way where attention is summed up in another order."""
    return close(found, wanted) if plan.encode.lossless else error(found, wanted) < 0.05


@pytest.mark.parametrize("name", mostly(PLANS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_member_says_the_same_on_another_device(kind, name):
    ids, plan = text(2, 40), PLANS[name]
    wanted, held = said(model_of("llama"), plan, ids)
    with elsewhere(kind, "llama") as (model, device):
        found, there = said(model, plan, ids.to(device))
    assert alike(found, wanted, plan)
    assert there.stored_bytes == held.stored_bytes


@pytest.mark.parametrize("plan", ["full", "snapkv(tokens=20)", "int8(rotate=True)", "kvzip(tokens=20)"])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_say_the_same_on_another_device(kind, plan):
    graph = Tape if kind == "away" else None  # None: CUDA's
    with elsewhere(kind, "llama") as (model, device):
        usual, other, wanted, found, _ = captures.said(model, plan, text(2, captures.TOKENS).to(device), graph=graph)
        assert error(found.cpu(), wanted.cpu()) < 0.05  # codes may round the other way
        assert captures.held(usual) == captures.held(other)


@pytest.mark.parametrize(
    ("family", "name"), [*(("qwen3", name) for name in ("full", "snapkv", "sentkv", "dynakv")), ("gemma3", "snapkv")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_say_the_same_on_another_device(family, kind, name):
    ids, plan = text(2, 40), PLANS[name]
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    wanted, _ = said(model_of(family), plan, ids, mask)
    with elsewhere(kind, family) as (model, device):
        found, _ = said(model, plan, ids.to(device), mask.to(device))
    real = mask.bool()[:, [*range(34), *range(34, 40), *range(34, 40)]]
    assert alike(found[real], wanted[real], plan)


@pytest.mark.parametrize("ways", [{"do_sample": False}, {"num_beams": 2, "do_sample": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_goes_on_the_same_on_another_device(kind, ways):
    ids = text(2, 30)

    def written(model, ids):
        cache = kvfold.cache(model, "snapkv(tokens=14) + int8")
        return model.generate(ids, past_key_values=cache, max_new_tokens=8, eos_token_id=None, **ways).cpu()

    wanted = written(model_of("llama"), ids)
    with elsewhere(kind, "llama") as (model, device):
        assert torch.equal(written(model, ids.to(device)), wanted)
