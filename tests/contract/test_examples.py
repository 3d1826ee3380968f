"""A member is one new file: a method, a codec and a tier that lie among the tests are found and used like others."""

import pytest
import torch

import kvfold
from driving import feed, kept
from fakes import FAMILIES, model_of, text
from kvfold.hf.hidden_states import attention_modules
from kvfold.place.tiers import tiers
from kvfold.plan import members
from plans import EXAMPLES, EXAMPLES_FOLDER

FILES = sorted(EXAMPLES_FOLDER.glob("*/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_one_file_under_60_lines_and_is_found_by_its_name(path):
    assert len(path.read_text().splitlines()) < 60
    assert path.stem in EXAMPLES
    found = tiers() if path.parent.name == "tiers" else members(path.parent.name)
    assert found[path.stem].__module__.endswith(f"{path.parent.name}.{path.stem}")


def test_there_is_an_example_of_each_kind():
    assert {path.parent.name for path in FILES} == {"select", "encode", "tiers"}


def entered(model, layers, ids):
    """Hidden states [Q, width] that enter the attention of each layer while a text is read without a folded cache."""
    found, hooks = {}, []
    for index, module in attention_modules(model, layers).items():

        def note(module, args, kwargs, index=index):
            found[index] = (args[0] if args else kwargs["hidden_states"])[0].detach()

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    feed(model, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_that_reads_hidden_states_gets_those_of_its_model(family):
    model, ids = model_of(family), torch.randperm(80)[None, :30] + 3  # no token twice: equal states are a tie
    cache = kvfold.cache(model, "novelty(tokens=12)")
    feed(model, ids, cache)
    for index, states in entered(model, list(cache.memory.layers), ids).items():
        novelty = (states[4:] - states[4:].mean(dim=0)).norm(dim=1)
        novelty[-1] = torch.inf  # the newest token stays
        wanted = [*range(4), *sorted((novelty.topk(8).indices + 4).tolist())]
        assert all(head == wanted for head in kept(cache)[index][0])


@pytest.mark.parametrize(
    "plan", ["novelty(tokens=12)", "novelty(tokens=12) + fp8", "fp8", "novelty(tokens=12, scope='turn')"]
)
def test_a_model_writes_with_an_example(plan):
    model, ids = model_of("llama"), text(2, 30, seed=2)
    cache = kvfold.cache(model, plan, stride=4)
    model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert cache.ledger().fed == 39
    assert str(cache.plan) == plan
    held = max(len(head) for rows in kept(cache).values() for row in rows for head in row)
    assert held == (39 if plan == "fp8" else 12 + 1)  # a token came after the last fold


def test_hidden_states_are_counted_and_go_with_the_columns_that_they_belong_to():
    model = model_of("llama")
    cache = kvfold.cache(model, "novelty(tokens=12)", prompt_tokens=0)
    feed(model, text(1, 20), cache)
    width = model.config.hidden_size
    counted = next(part for part in cache.ledger().parts if part.name == "hidden_states")
    assert counted.stored_bytes == 20 * width * 4 * len(cache.memory.layers)
    cache.fold()
    assert sum(part.stored_bytes for part in cache.ledger().parts if part.name == "hidden_states") == 0


def test_the_dictionary_tier_answers_what_the_device_answers():
    model, ids = model_of("llama"), text(2, 60)
    base = "sentkv(budget=24, length=5, window=2, recent=2, tier={!r})"
    found = []
    for tier in ("device", "dictionary"):
        cache = kvfold.cache(model, base.format(tier), stride=16)
        found.append(feed(model, ids, cache, sizes=(40, *[1] * 20)))
    assert torch.equal(*found)
    assert {part.device for part in cache.ledger().parts if part.name == "folded"} == {"dictionary"}


@pytest.mark.parametrize("name", sorted(tiers()))
def test_every_tier_reads_what_was_written_and_zeros_elsewhere(name, tmp_path):
    kind = tiers()[name]
    tier = kind.open(directory=str(tmp_path) if kind.needs_directory else None, limit_bytes=None)
    cpu = torch.device("cpu")
    for inner in ((), (3,), (2, 3)):
        shape = (2, 10, *inner)
        buffer, wanted = tier.buffer(shape, torch.float32, cpu), torch.zeros(shape)
        for head, start, count in ((0, 0, 4), (1, 0, 2), (1, 2, 5), (0, 4, 6)):
            values = torch.randn(count, *inner)
            buffer.write(head, start, values)
            wanted[head, start : start + count] = values
        assert torch.equal(buffer.read(1, 1, 6), wanted[1, 1:6])
        assert torch.equal(buffer.window(3, 8), wanted[:, 3:8])
        assert buffer.window(0, 0).shape == (2, 0, *inner)
        some = torch.tensor([19, 0, 7, 12, 0])
        assert torch.equal(buffer.gather(some), wanted.flatten(0, 1)[some])
        assert sum(tensor.numel() for tensor in buffer.tensors()) >= 17
