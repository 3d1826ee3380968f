from itertools import chain

import pytest
import torch
from strangers import stranger

from kvfold.bench.ask import divergence
from kvfold.bench.ask.divergence import CachePair, compare, joined
from kvfold.bench.ask.reader import open_rows
from kvfold.chat.rows import Rows

PLANS = ["none", "streaming_llm(keep=0.4)", "h2o(keep=0.4) + int8", "snapkv(keep=0.4)", "int4"]
FIELDS = ("divergence", "agrees", "likelihood", "full_likelihood", "right")


def words(count, seed):
    return torch.randint(300, 2000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def opened(plan, *, rows, subject=None):
    """A pair of caches that has read nothing."""
    folded, full = (open_rows(subject or stranger(), one, count=rows) for one in (plan, "full"))
    return CachePair(subject or stranger(), folded, full)


def read_all(plan, rows, *, model=None):
    """Each row in chunks, folded after each, compared from the second on."""
    pair = opened(plan, rows=len(rows), subject=model or stranger())
    pair.feed([chunks[0] for chunks in rows])
    pair.fold()
    found = []
    for step in range(1, len(rows[0])):
        following = [(chunks[step] + (chunks[step + 1] if step + 1 < len(chunks) else [7]))[1:] for chunks in rows]
        cut = [after[: len(chunks[step])] for after, chunks in zip(following, rows, strict=True)]
        found.append(pair.read([chunks[step] for chunks in rows], cut))
        pair.fold()
    return [joined(pieces) for pieces in zip(*found, strict=True)]


def chunks_of(row):
    return [words(20 + 7 * row, row), words(9 + row, 10 + row), words(13 - 3 * row, 20 + row)]


def test_the_full_cache_is_nowhere_from_itself_and_says_what_one_plain_forward_says():
    one = read_all("full", [chunks_of(0)])[0]
    assert one.divergence.max() == 0.0
    assert one.agrees.all()
    tokens = torch.tensor([*chain(*chunks_of(0)), 7])
    with torch.no_grad():
        plain = stranger().model(tokens[None, :-1]).logits[0].log_softmax(dim=-1)
    expected = plain[20:].gather(1, tokens[21:, None])[:, 0]
    torch.testing.assert_close(one.likelihood, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.full_likelihood, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_chunks_say_what_token_by_token_says_with_the_same_folds(plan):
    chunks = chunks_of(0)
    one = read_all(plan, [chunks])[0]
    rows, stock = Rows(stranger().model, plan, rows=1), Rows(stranger().model, None, rows=1)
    tokens, index = [*chain(*chunks), 7], 0
    for step, chunk in enumerate(chunks):
        for token in chunk:
            own, full = (each.logits([[token]])[0].log_softmax(dim=-1) for each in (rows, stock))
            index += 1
            if step:
                at, truth = index - len(chunks[0]) - 1, tokens[index]
                assert one.divergence[at] == pytest.approx(float((full.exp() * (full - own)).sum()), abs=1e-4)
                assert one.likelihood[at] == pytest.approx(float(own[truth]), abs=1e-3)
                assert bool(one.agrees[at]) == (int(own.argmax()) == int(full.argmax()))
        rows.fold()
    assert len(one.divergence) == index - len(chunks[0])
    assert one.divergence.min() >= -1e-5
    assert one.divergence.max() > 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_ragged_rows_are_compared_as_each_alone(plan):
    together = read_all(plan, [chunks_of(row) for row in range(3)])
    for row, one in enumerate(together):
        alone = read_all(plan, [chunks_of(row)])[0]
        for name in FIELDS:
            torch.testing.assert_close(getattr(one, name), getattr(alone, name), atol=1e-4, rtol=1e-4)


def test_memory_bounds_the_width_of_a_forward_and_changes_no_result(monkeypatch):
    wide = read_all("snapkv(keep=0.4)", [chunks_of(0), chunks_of(1)])
    monkeypatch.setattr(divergence, "LOGITS", 2 * 2048 * 4)
    widths = []
    hook = stranger().model.register_forward_pre_hook(
        lambda _, positional, named: widths.append(positional[0].shape[1]), with_kwargs=True
    )
    narrow = read_all("snapkv(keep=0.4)", [chunks_of(0), chunks_of(1)])
    hook.remove()
    assert max(widths[2:]) == 4  # the first two are the contexts, which give no expectations over the vocabulary
    for one, other in zip(wide, narrow, strict=True):
        torch.testing.assert_close(one.divergence, other.divergence, atol=1e-5, rtol=1e-4)


def test_right_means_that_the_true_token_would_be_said():
    chunks = [words(30, 1), words(6, 2)]
    pair = opened("snapkv(keep=0.4)", rows=1)
    pair.feed([chunks[0]])
    pair.fold()
    said = pair.folded.answer([chunks[1]], max_new_tokens=5)[0]
    read = pair.read([[*chunks[1], *said[:-1]]], [[*chunks[1][1:], *said]])[0]
    assert read.right[-5:].all()
    assert not read.right[:5].all()


@pytest.mark.parametrize("plan", ["full", "int8", "snapkv(keep=0.4)", "none"])
def test_greedy_counts_the_tokens_said_alike_and_leaves_the_rows_as_they_were(plan):
    histories, prompts = [words(40, 1), words(31, 2)], [words(3, 3), words(5, 4)]
    pair = opened(plan, rows=2)
    pair.feed(histories)
    pair.fold()
    alike, pace = pair.greedy(prompts, most=12)
    assert pair.greedy(prompts, most=12)[0] == alike
    assert pace.steps == 11
    for row, count in enumerate(alike):
        own, full = (
            pair.folded.answer(prompts, max_new_tokens=12)[row],
            pair.full.answer(prompts, max_new_tokens=12)[row],
        )
        assert own[:count] == full[:count]
        assert count == 12 or own[count] != full[count]
    assert (alike == [12, 12]) == (plan == "full") or plan == "int8"


def test_divergence_is_torchs_own_and_ignores_what_full_excludes():
    generator = torch.Generator().manual_seed(0)
    own, full = (torch.randn(5, 11, generator=generator) * 3 for _ in range(2))
    expected = torch.nn.functional.kl_div(
        own.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    truth = torch.arange(5)
    torch.testing.assert_close(compare(own, full, truth).divergence, expected)
    own[:, 10] = full[:, 10] = -torch.inf
    assert compare(own, full, truth).divergence.isfinite().all()
