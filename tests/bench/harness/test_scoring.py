import pytest
import torch

from kvfold.bench.harness.scoring import LikelihoodRequest as Request
from kvfold.bench.harness.scoring import Scorer
from kvfold.errors import ModelError


def passages(seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(10, 2000, (size,), generator=generator).tolist())

    return [Request(context=tokens(1, 60), continuation=tokens(1, 12)) for _ in range(count)]


def stock(subject, passage):
    """The log-probability of a continuation, and whether it is greedy, without any cache."""
    ids = torch.tensor([[*passage.context, *passage.continuation]])
    with torch.no_grad():
        logits = subject.model(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)[len(passage.context) - 1 :]
    came = torch.tensor(passage.continuation)
    return float(logits.gather(1, came[:, None]).sum()), bool((logits.argmax(-1) == came).all())


def close(found, wanted):
    return [one.log_probability for one in found] == pytest.approx([p for p, _ in wanted], rel=1e-4, abs=1e-4) and [
        one.greedy for one in found
    ] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("stride", [1, 3, 64])
def test_full_gives_the_models_own_numbers_however_continuations_are_cut(subject, stride):
    asked = passages()
    found = Scorer(subject, "full", rows=4, stride=stride).likelihoods(asked)
    assert close(found, [stock(subject, one) for one in asked])


def test_what_greedy_decoding_says_is_greedy(subject):
    context = passages()[0].context
    scorer = Scorer(subject, "snapkv(tokens=8, window=4)", rows=4, stride=64)
    said = scorer.continuations([context], tokens=9, ended=lambda answer: False)[0]
    other = (*said[:-1], (said[-1] + 1) % 2000)
    found = scorer.likelihoods([Request(context=context, continuation=c) for c in (tuple(said), other)])
    assert len(said) == 9
    assert [one.greedy for one in found] == [True, False]


def test_a_shared_context_is_folded_once_and_changes_no_number(subject, monkeypatch):
    from kvfold.bench.ask.audit import AuditedRows

    context = passages()[1].context
    asked = [Request(context=context, continuation=one.continuation) for one in passages(1)]
    alone = [Scorer(subject, "h2o(keep=0.5)", rows=4, stride=64).likelihoods([one])[0] for one in asked]
    folds = []
    real = AuditedRows.fold
    monkeypatch.setattr(AuditedRows, "fold", lambda rows: (folds.append(rows), real(rows))[1])
    together = Scorer(subject, "h2o(keep=0.5)", rows=4, stride=64).likelihoods(asked)
    assert len(folds) == 1
    assert [a.log_probability for a in alone] == pytest.approx([t.log_probability for t in together], rel=1e-4)


def test_the_first_token_of_a_continuation_is_predicted_from_what_was_kept(subject):
    """With `none` only the sinks are left, so a context's middle says nothing about even one token after it."""
    ends = passages(2)
    first, other = ends[0].context[:1] * 4, (7, 8, 9)
    one = [Request(context=(*first, *middle, 50), continuation=(60,)) for middle in (other * 5, other[::-1] * 5)]
    kept = Scorer(subject, "none", rows=4, stride=64).likelihoods(one)
    whole = Scorer(subject, "full", rows=4, stride=64).likelihoods(one)
    assert abs(whole[0].log_probability - whole[1].log_probability) > 0.01
    # the last token itself was computed on what was kept: only its own key and value, and the sinks', count
    assert kept[0].log_probability == pytest.approx(kept[1].log_probability, abs=1e-4)


def test_a_long_continuation_goes_on_folding(subject):
    one = passages(3)[0]
    long = Request(context=one.context, continuation=tuple(range(10, 90)))
    found = {
        plan: Scorer(subject, plan, rows=4, stride=16).likelihoods([long])[0].log_probability
        for plan in ("full", "none", "streaming_llm(tokens=12)")
    }
    assert found["full"] == pytest.approx(stock(subject, long)[0], rel=1e-4)
    assert len({round(value, 2) for value in found.values()}) == 3
    scorer = Scorer(subject, "streaming_llm(tokens=12)", rows=4, stride=16)
    scorer.likelihoods([long])
    cost = scorer.costs.mean()
    assert cost["full_bytes"] == 2 * 2 * 2 * 8 * 4 * (len(long.context) + len(long.continuation) - 1)
    assert cost["stored"] < 0.35


@pytest.mark.parametrize("plan", ["full", "snapkv(keep=0.5)"])
def test_continuations_stop_where_they_end_and_not_before(subject, plan):
    contexts = [one.context for one in passages(count=2)]
    whole = Scorer(subject, plan, rows=4, stride=64).continuations(contexts, tokens=36, ended=lambda answer: False)
    seen = []

    def ended(answer):
        seen.append(len(answer))
        return len(answer) >= 5

    short = Scorer(subject, plan, rows=4, stride=64).continuations(contexts, tokens=36, ended=ended)
    assert [answer[:32] for answer in whole] == [answer[:32] for answer in short]
    assert max(map(len, short)) <= 32 < max(map(len, whole))
    assert seen


def test_costs_are_means_over_requests(subject):
    scorer = Scorer(subject, "streaming_llm(keep=0.5)", rows=2, stride=64)
    asked = passages(4, count=8)
    scorer.likelihoods(asked)
    cost = scorer.costs.mean()
    assert cost["full_bytes"] == pytest.approx(2 * 2 * 2 * 8 * 4 * sum(len(one.context) - 1 for one in asked) / 8)
    assert 0.3 < cost["stored"] < 0.9
    assert cost["ttft_seconds"] > 0.0
    assert cost["tpot_seconds"] == 0.0


def test_too_long_a_text_is_refused(subject):
    with pytest.raises(ModelError, match="256 positions"):
        Scorer(subject, "full", rows=2, stride=64).likelihoods([Request(context=(5,) * 300, continuation=(6,))])
