"""A captured decode step answers what an ordinary one does, and leaves the cache as that would.

The graph is pretended (tape.py), so a number of the host that changes with the text would be frozen and found. What is
refused stands in test_captured_refusals.py, real graphs in test_graphs.py.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

import pytest
import torch
from transformers import DynamicCache

import kvfold
from captures import LOSSLESS, LOSSY, PROMPT, SETTINGS, TOKENS, alike, caches, held, said
from driving import close, error, feed
from fakes import fresh, model_of, text
from kvfold.attention.kernels import compiled
from kvfold.errors import CacheError
from kvfold.hf import static_past
from kvfold.plan import Plan
from plans import Uneven
from tape import Tape


@pytest.mark.parametrize("plan", LOSSLESS)
def test_captured_steps_say_what_ordinary_ones_say_across_folds(plan):
    usual, other, wanted, found, decode = said(model_of("llama"), plan, text(2, TOKENS))
    assert close(found, wanted)
    assert alike(usual, other)
    folds = usual.memory.rules.folds
    assert decode.captures == (3 if folds else 2)  # after 10 and 20 tokens there were folds; else room for 16 was full


@pytest.mark.parametrize("plan", LOSSY)
def test_codes_are_read_by_captured_steps_too(plan):
    usual, other, wanted, found, _ = said(model_of("llama"), plan, text(2, TOKENS))
    assert error(found, wanted) < 0.05  # codes may round the other way where sums have another order
    assert held(usual) == held(other)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families_are_captured(family):
    usual, other, wanted, found, _ = said(model_of(family), "snapkv(tokens=20)", text(1, TOKENS))
    assert close(found, wanted)
    assert alike(usual, other)


@pytest.mark.parametrize("plan", ["sonic(keep=0.25)", "dynakv(rate=0.47)", "dynakv(rate=0.47, int8=True)"])
def test_what_was_learned_for_a_model_is_captured(plan, monkeypatch):
    monkeypatch.setattr(compiled, "_kernel", lambda size: None)  # it is called past torch, and on processors only
    model, tokenizer = kvfold.load("tiny", dtype="float32")
    words = tokenizer.encode("Anna lives in Turin and has a grey cat called Pixel. The first price was 7. " * 4)
    usual, other, wanted, found, _ = said(model, plan, torch.tensor([words[:TOKENS]]))
    assert error(found, wanted) < 2e-4 * error(wanted, 0 * wanted)
    assert held(usual) == held(other)


def test_heads_that_hold_different_numbers_of_slots_are_captured():
    usual, other, wanted, found, _ = said(model_of("llama"), Plan(select=Uneven(tokens=12)), text(2, TOKENS))
    assert len(usual.memory.layers[0].state.folded.rectangles) == 4  # two rows of two heads
    assert close(found, wanted)
    assert alike(usual, other)


@pytest.mark.parametrize("plan", ["full", "snapkv(tokens=20)"])
def test_a_long_tail_is_read_without_a_mask_up_to_where_the_capture_began(plan, monkeypatch):
    monkeypatch.setattr(static_past, "_NEAR", 4)
    usual, other, wanted, found, decode = said(model_of("llama"), plan, text(2, TOKENS), room=5)
    assert close(found, wanted)
    assert alike(usual, other)
    assert decode.captures == 5  # of 22 tokens; folds come where the room is full too


def test_a_step_is_captured_anew_when_its_room_is_full_and_after_a_fold_and_only_then():
    model, ids = model_of("llama"), text(1, PROMPT + 30)
    cache, _ = caches(model, "snapkv(tokens=20)", ids, stride=None)
    decode = kvfold.captured(model, cache, room=4, graph=Tape)
    counts = []
    for at in range(PROMPT, PROMPT + 10):
        decode.step(ids[:, at : at + 1])
        counts.append(decode.captures)
    assert counts == [1] * 4 + [2] * 4 + [3] * 2
    cache.fold()
    decode.step(ids[:, -1:])
    assert decode.captures == 4
    feed(model, ids[:, :1], cache)  # an ordinary token, into the room that is there
    decode.step(ids[:, -1:])
    assert decode.captures == 4
    feed(model, ids[:, :9], cache)
    decode.step(ids[:, -1:])
    assert decode.captures == 5


@pytest.mark.parametrize("plan", ["full", "streaming_llm(tokens=20)", "h2o(tokens=20)", "mean_pool(tokens=20)"])
def test_everything_goes_on_after_captured_steps_as_without(plan, tmp_path):
    model, ids, more = model_of("llama"), text(2, PROMPT + 7), text(2, 5, seed=4)
    usual, other, *_, decode = said(model, plan, ids)
    mask = torch.ones(2, ids.shape[1] + 5, dtype=torch.long)
    other.save(tmp_path / "held.kvfold")
    ways = [usual, other.fork(), kvfold.load_cache(tmp_path / "held.kvfold", model), other]
    written = [model.generate(more, attention_mask=mask, past_key_values=one, **SETTINGS) for one in ways]
    assert all(torch.equal(one, written[0]) for one in written)
    for one in (usual, other):
        one.fold()
    assert close(decode.step(more[:, :1]), feed(model, more[:, :1], usual)[:, -1])
    assert alike(usual, other)


def test_a_whole_text_goes_on_after_captured_steps_and_another_one_is_refused():
    model, ids = model_of("llama"), text(1, TOKENS)
    usual, other, *_ = said(model, "snapkv(tokens=20)", ids)
    longer = torch.cat([ids, text(1, 3, seed=8)], dim=1)
    written = [model.generate(longer, past_key_values=one, **SETTINGS) for one in (usual, other)]
    assert torch.equal(*written)
    _, other, *_ = said(model, "snapkv(tokens=20)", ids)
    longer[0, PROMPT + 3] += 1  # a token that came by a captured step
    with pytest.raises(CacheError, match="are not those that the cache was fed"):
        model.generate(longer, past_key_values=other, **SETTINGS)


def test_tokens_are_taken_back_and_marks_are_restored():
    model, ids = model_of("llama"), text(1, PROMPT + 12)
    usual, other = caches(model, "snapkv(tokens=20)", ids)
    decode = kvfold.captured(model, other, graph=Tape)
    marks = [one.mark() for one in (usual, other)]
    for at in range(PROMPT, PROMPT + 6):
        decode.step(ids[:, at : at + 1])
        feed(model, ids[:, at : at + 1], usual)
    for one in (usual, other):
        one.crop(-2)
    assert close(decode.step(ids[:, -1:]), feed(model, ids[:, -1:], usual)[:, -1])
    assert alike(usual, other)
    for one, mark in zip((usual, other), marks, strict=True):
        one.restore(mark)
    assert close(decode.step(ids[:, -2:-1]), feed(model, ids[:, -2:-1], usual)[:, -1])
    assert alike(usual, other)


def test_folds_wait_where_tokens_may_be_taken_back():
    model, ids = model_of("llama"), text(1, PROMPT + 16)
    usual, other = caches(model, "snapkv(tokens=20)", ids)
    decode = kvfold.captured(model, other, graph=Tape)
    for one in (usual, other):
        one.activate_past_recording()
    for at in range(PROMPT, PROMPT + 10):
        decode.step(ids[:, at : at + 1])
        feed(model, ids[:, at : at + 1], usual)
    for one in (usual, other):
        one.crop(-3)  # behind the columns where a fold was due
    for at in range(PROMPT + 10, PROMPT + 16):
        assert close(decode.step(ids[:, at : at + 1]), feed(model, ids[:, at : at + 1], usual)[:, -1])
    assert alike(usual, other)
    assert decode.captures == 2


def test_forks_are_captured_by_themselves_and_disturb_nobody():
    model, ids = model_of("llama"), text(1, PROMPT + 8)
    usual, other = caches(model, "snapkv(tokens=20)", ids)
    twin = other.fork()
    steps = [kvfold.captured(model, one, graph=Tape) for one in (other, twin)]
    found = []
    for at in range(PROMPT, PROMPT + 8):
        found.append(steps[0].step(ids[:, at : at + 1]))
        steps[1].step(ids[:, at : at + 1] + 1)
    wanted = feed(model, ids[:, PROMPT:], usual, sizes=(1,) * 8)
    assert close(torch.stack(found, dim=1), wanted)


def test_a_step_that_fails_leaves_the_cache_as_it_was():
    model, ids = model_of("llama"), text(1, PROMPT + 4)
    usual, other = caches(model, "h2o(tokens=20)", ids)
    decode = kvfold.captured(model, other, graph=Tape)
    decode.step(ids[:, -2:-1])
    feed(model, ids[:, -2:-1], usual)

    class Interrupted(Tape):
        def replay(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvfold.captured(model, other, graph=Interrupted).step(ids[:, -1:])
    assert other.memory.fed == PROMPT + 1
    assert alike(usual, other)
    assert close(decode.step(ids[:, -1:]), feed(model, ids[:, -1:], usual)[:, -1])


def test_ordinary_forwards_are_what_they_were():
    model, ids = fresh("llama"), text(1, PROMPT + 6)
    with torch.no_grad():
        wanted = model(ids).logits
    usual, other = caches(model, "full", ids)
    decode = kvfold.captured(model, other, graph=Tape)
    decode.step(ids[:, PROMPT : PROMPT + 1])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
        assert close(model(ids, past_key_values=DynamicCache(config=model.config)).logits, wanted)
    assert close(feed(model, ids[:, PROMPT:], usual, sizes=(1,) * 6), wanted[:, PROMPT:])
    assert close(feed(model, ids[:, PROMPT + 1 :], other), wanted[:, PROMPT + 1 :])


def test_steps_in_inference_mode_can_be_followed_outside_of_it():
    model, ids = model_of("llama"), text(1, PROMPT + 4)
    usual, other = caches(model, "snapkv(tokens=20)", ids)
    decode = kvfold.captured(model, other, graph=Tape)
    with torch.inference_mode():
        decode.step(ids[:, PROMPT : PROMPT + 1])
    decode.step(ids[:, PROMPT + 1 : PROMPT + 2])
    wanted = feed(model, ids[:, PROMPT:], usual, sizes=(1, 1))
    assert close(feed(model, ids[:, PROMPT + 2 :], other), wanted[:, 2:])


def test_logits_are_the_callers_own():
    model, ids = model_of("llama"), text(1, PROMPT + 2)
    cache, _ = caches(model, "full", ids)
    decode = kvfold.captured(model, cache, graph=Tape)
    first = decode.step(ids[:, -2:-1])
    before = first.clone()
    decode.step(ids[:, -1:])
    assert torch.equal(first, before)
