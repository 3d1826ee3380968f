"""A batch of folded caches: every row says what its cache says alone, whatever the others are, come and go."""

import gc

import pytest
import torch

import kvfold
from driving import close, feed, storages
from fakes import fresh, model_of, text
from kvfold.errors import CacheError
from kvfold.hf.batched import BatchedCache

STEPS = 9  # more than two strides
PLANS = (
    "full",
    "snapkv(tokens=14)",
    "h2o(tokens=14) + int8",
    "kvzip(tokens=14)",
    "mean_pool(tokens=14)",
    "streaming_llm(tokens=20)",
    "sentkv(budget=24, length=5, window=2, recent=2)",
    "chunkkv(tokens=14) + int4",
)


def read(model, plan, tokens, *, seed):
    """A cache that has read a text, and the likeliest token after it."""
    cache = kvfold.cache(model, plan, stride=4)
    logits = feed(model, text(1, tokens, seed=seed), cache)
    return cache, int(logits[0, -1].argmax())


def alone(model, cache, token, steps):
    said = []
    for _ in range(steps):
        said.append(token)
        token = int(feed(model, torch.tensor([[token]]), cache)[0, -1].argmax())
    return said


def together(model, batch, tokens, steps):
    said = [[] for _ in tokens]
    for _ in range(steps):
        for row, token in zip(said, tokens, strict=True):
            row.append(token)
        tokens = batch.decode(model, tokens).argmax(dim=-1).tolist()
    return said


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_eight_chats_of_different_length_and_plan_say_what_each_says_alone(family):
    model = model_of(family)
    starts = [read(model, plan, 9 + 13 * number, seed=number) for number, plan in enumerate(PLANS)]
    wanted = [alone(model, cache.fork(), token, STEPS) for cache, token in starts]
    batch = BatchedCache([cache for cache, _ in starts])
    assert together(model, batch, [token for _, token in starts], STEPS) == wanted
    assert [row.memory.fed for row in batch.rows] == [9 + 13 * number + STEPS for number in range(8)]


def test_the_shipped_model_says_the_same_in_a_batch():
    model, tokenizer = kvfold.load("tiny")
    caches, tokens = [], []
    for number, plan in enumerate(["snapkv(keep=0.5)", "sonic(keep=0.5)", "dynakv(rate=0.47)"]):
        ids = tokenizer("The lamp costs 30. Anna lives in Turin. " * (2 + number), return_tensors="pt").input_ids
        caches.append(kvfold.cache(model, plan, tokenizer=tokenizer, stride=8))
        tokens.append(int(feed(model, ids, caches[-1])[0, -1].argmax()))
    wanted = [alone(model, cache.fork(), token, 9) for cache, token in zip(caches, tokens, strict=True)]
    assert together(model, BatchedCache(caches), tokens, 9) == wanted


def test_rows_join_and_leave_at_any_step_and_nothing_of_them_is_copied():
    model = model_of("llama")
    (first, a), (second, b), (third, c) = (read(model, "full", 20 + 7 * n, seed=n) for n in range(3))
    wanted = [alone(model, cache.fork(), token, 6) for cache, token in ((first, a), (second, b), (third, c))]
    batch = BatchedCache([first, second])
    held = storages(second.memory.layers)
    said_a, said_b = together(model, batch, [a, b], 1)
    assert held.keys() & storages(second.memory.layers).keys()
    batch.leave(first)
    batch.join(third)
    next_b, said_c = together(model, batch, [wanted[1][1], c], 5)
    assert (said_b + next_b, said_c) == (wanted[1], wanted[2][:5])
    assert said_a + alone(model, first, wanted[0][1], 5) == wanted[0]


def test_a_forward_that_fails_in_one_row_is_undone_in_all():
    model = fresh("llama")
    caches = [read(model, "full", 12 + number, seed=number)[0] for number in range(3)]
    wanted = [feed(model, torch.tensor([[5]]), cache.fork()) for cache in caches]
    batch = BatchedCache(caches)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    handle = model.model.layers[-1].mlp.register_forward_hook(fails)
    layer = caches[1].memory.layers[2]
    attend = layer.attend
    layer.attend = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        batch.decode(model, [5, 5, 5])
    handle.remove()
    layer.attend = attend
    assert [cache.ledger().fed for cache in caches] == [12, 13, 14]
    found = batch.decode(model, [5, 5, 5])
    for number in range(3):
        assert close(found[number], wanted[number][0, -1])


def test_a_batch_of_caches_that_have_read_nothing_reads_its_first_tokens():
    model = model_of("llama")
    batch = BatchedCache([kvfold.cache(model, "full"), kvfold.cache(model, "full")])
    found = batch.decode(model, [7, 9])
    assert close(found[0], feed(model, torch.tensor([[7]]))[0, -1])
    assert close(found[1], feed(model, torch.tensor([[9]]))[0, -1])


def test_what_a_batch_cannot_do_is_refused():
    model, other = model_of("llama"), model_of("qwen2")
    cache, token = read(model, "full", 9, seed=0)
    batch = BatchedCache([cache])
    for joins, why in ((cache, "twice"), (kvfold.cache(other, "full"), "another model's")):
        with pytest.raises(CacheError, match=why):
            batch.join(joins)
    pair = kvfold.cache(model, "full")
    feed(model, text(2, 9), pair)
    with pytest.raises(CacheError, match="2 rows was to join"):
        batch.join(pair)
    with pytest.raises(CacheError, match="not in it"):
        batch.leave(pair)
    with pytest.raises(CacheError, match="2 tokens were fed"):
        batch.decode(model, [token, token])
    with pytest.raises(CacheError, match="give position_ids"):
        model(torch.tensor([[token]]), past_key_values=batch)
    with pytest.raises(CacheError, match="end at"):
        model(torch.tensor([[token]]), past_key_values=batch, position_ids=torch.tensor([[3]]))
    mask = torch.ones(1, 10)
    with pytest.raises(CacheError, match="never padded"):
        model(torch.tensor([[token]]), past_key_values=batch, position_ids=batch.positions, attention_mask=mask)
    with pytest.raises(CacheError, match="its rows differ"):
        batch.crop(-1)
    ids = torch.tensor([[token, token]])
    with pytest.raises(CacheError, match="1 rows of 2 tokens"):
        model(ids, past_key_values=batch, position_ids=torch.tensor([[9, 10]]))
    assert cache.ledger().fed == 9


def test_a_model_is_as_before_when_its_batch_is_gone():
    model = fresh("llama")
    model.set_attn_implementation("sdpa")
    batch = BatchedCache([read(model, "full", 9, seed=0)[0]])
    batch.decode(model, [5])
    assert model.config._attn_implementation == "kvfold_sdpa"
    del batch
    gc.collect()
    assert model.config._attn_implementation == "sdpa"
