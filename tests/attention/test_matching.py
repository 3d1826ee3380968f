"""Matched slots say what all slots said, to the queries they were matched by and to others of their kind."""

import pytest
import torch

from kvfold.attention.matching import LARGEST_CHANGE, Seen, largest_weight, match
from kvfold.attention.partial import partial

HEADS, GROUP, SLOTS, SIZE, ASKED = 2, 3, 60, 16, 80


def some_queries(count, *, seed):
    """Queries that agree in a direction, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(HEADS * GROUP, 1, SIZE, generator=torch.Generator().manual_seed(1))
    return common + 0.7 * torch.randn(HEADS * GROUP, count, SIZE, generator=generator)


def a_segment():
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(HEADS, SLOTS, SIZE, generator=generator)
    return keys, torch.randn(HEADS, SLOTS, SIZE, generator=generator), torch.randn(HEADS, 4, SIZE, generator=generator)


def read(queries, keys, values, kept=None):
    """What queries read, with their log-sum-exp: slots that are not kept are not there."""
    outputs, sums = [], []
    for head in range(HEADS):
        there = slice(None) if kept is None else kept[head]
        of_head = queries[None, head * GROUP : (head + 1) * GROUP]
        found = partial(of_head, keys[None, head : head + 1, there], values[None, head : head + 1, there], scale=0.25)
        outputs.append(found.output[0])
        sums.append(found.log_sum_exp[0])
    return torch.cat(outputs), torch.cat(sums)


def whole(beside, found):
    """What is read of both."""
    share = torch.sigmoid(beside[1] - found[1])[..., None]
    return share * beside[0] + (1 - share) * found[0]


def fitted(queries, keys, values, beside, kept):
    """Keys and values with every head's slots matched."""
    new_keys, new_values = keys.clone(), values.clone()
    for head in range(HEADS):
        group = slice(head * GROUP, (head + 1) * GROUP)
        seen = Seen(
            queries=queries[group].flatten(0, 1),
            keys=keys[head],
            values=values[head],
            beside=beside[0][group].flatten(0, 1),
            log_sum_exp=beside[1][group].flatten(),
            scale=0.25,
        )
        new_keys[head, kept[head]], new_values[head, kept[head]] = match(seen, kept[head])
    return new_keys, new_values


def matched(kept, *, seed=5):
    keys, values, sinks = a_segment()
    queries = some_queries(ASKED, seed=seed)
    return fitted(queries, keys, values, read(queries, sinks, sinks), kept)


def a_choice(*counts):
    kept = torch.zeros(HEADS, SLOTS, dtype=torch.bool)
    for head, count in enumerate(counts):
        kept[head, torch.randperm(SLOTS, generator=torch.Generator().manual_seed(head))[:count]] = True
    return kept


# Two slots cannot say what 60 said: their weights and changes are bounded.
@pytest.mark.parametrize(("counts", "most"), [((12, 12), 0.5), ((30, 6), 0.5), ((2, 20), 0.7)])
@pytest.mark.parametrize("seed", [5, 6])  # the queries that were matched, and others
def test_queries_read_nearly_what_they_read_of_the_whole_segment(counts, most, seed):
    kept = a_choice(*counts)
    keys, values, sinks = a_segment()
    queries = some_queries(ASKED, seed=seed)
    beside = read(queries, sinks, sinks)
    true = whole(beside, read(queries, keys, values))
    words = whole(beside, read(queries, keys, values, kept))
    rows = whole(beside, read(queries, *matched(kept), kept))
    assert float((rows - true).square().mean()) < most * float((words - true).square().mean())


def test_slots_that_are_not_kept_stay_as_they_were():
    kept = a_choice(12, 5)
    keys, values, _ = a_segment()
    new_keys, new_values = matched(kept)
    assert torch.equal(new_keys[~kept], keys[~kept])
    assert torch.equal(new_values[~kept], values[~kept])


def test_a_segment_that_stays_whole_is_as_it_was():
    kept = torch.ones(HEADS, SLOTS, dtype=torch.bool)
    keys, values, _ = a_segment()
    new_keys, new_values = matched(kept)
    torch.testing.assert_close(new_keys, keys, atol=1e-3, rtol=0)
    torch.testing.assert_close(new_values, values, atol=1e-3, rtol=0)


def test_what_hardly_anybody_reads_hardly_changes():
    kept = a_choice(3, 3)
    keys, values, sinks = a_segment()
    queries = some_queries(ASKED, seed=5)
    output, log_sum_exp = read(queries, sinks, sinks)
    beside = (output, log_sum_exp + 20)  # all look at the sinks
    _, new_values = fitted(queries, keys, values, beside, kept)
    assert float((new_values - values).abs().max()) < 0.01


def test_more_slots_than_queries_are_matched_too():
    kept = a_choice(20, 20)
    keys, values, sinks = a_segment()
    queries = some_queries(5, seed=5)
    beside = read(queries, sinks, sinks)
    rows = fitted(queries, keys, values, beside, kept)
    true = whole(beside, read(queries, keys, values))
    error = float((whole(beside, read(queries, *rows, kept)) - true).square().mean())
    assert error < 0.5 * float((whole(beside, read(queries, keys, values, kept)) - true).square().mean())


def test_a_slot_stands_for_a_few_tokens_at_most():
    keys = torch.randn(1, 1, SIZE, generator=torch.Generator().manual_seed(0)).expand(HEADS, 200, SIZE).contiguous()
    kept = torch.zeros(HEADS, 200, dtype=torch.bool)
    kept[:, 0] = True
    queries = some_queries(ASKED, seed=5)
    beside = read(queries, keys[:, :1], keys[:, :1])
    new_keys, _ = fitted(queries, keys, keys, beside, kept)
    raised = (queries * 0.25) @ (new_keys - keys)[:, 0].repeat_interleave(GROUP, dim=0)[..., None]
    assert float(raised.mean().exp()) < 1.1 * largest_weight(200)


@pytest.mark.parametrize("counts", [(12, 12), (1, 3)])
def test_a_value_changes_by_a_part_of_its_length_at_most(counts):
    kept = a_choice(*counts)
    _, values, _ = a_segment()
    _, new_values = matched(kept)
    change = (new_values - values).norm(dim=2)[kept]
    assert bool((change <= 1.001 * LARGEST_CHANGE * values.norm(dim=2)[kept]).all())
    assert float(change.max()) > 0.1, "nothing was fitted"


def test_queries_that_read_only_slots_that_leave_leave_nothing_undefined():
    kept = a_choice(12, 1)
    keys, values, sinks = a_segment()
    queries = some_queries(ASKED, seed=5)
    dropped = int((~kept[0]).nonzero()[0])
    queries[0, 0] = 2000 * keys[0, dropped]  # as sharp as the attention of a small model
    new_keys, new_values = fitted(queries, keys, values, read(queries, sinks, sinks), kept)
    assert bool(new_keys.isfinite().all())
    assert bool(new_values.isfinite().all())
