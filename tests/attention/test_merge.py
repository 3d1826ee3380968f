"""The merge: parts weigh as their scores do, in any order and any grouping, and the empty one weighs nothing."""

import pytest
import torch

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, nothing
from kvfold.attention.reference import attend_part

SCALE = 0.4


def parts_of(counts, *, dtype=torch.float32):
    """Attention over pieces of one text, and over all of it."""
    queries = torch.randn(2, 4, 3, 8, dtype=dtype)
    keys, values = (torch.randn(2, 2, sum(counts), 8, dtype=dtype) for _ in range(2))
    pieces = zip(keys.split(counts, dim=2), values.split(counts, dim=2), strict=True)
    whole = Partial(*attend_part(queries, keys, values, scale=SCALE))
    return [Partial(*attend_part(queries, *piece, scale=SCALE)) for piece in pieces], whole


def close(one, other):
    return torch.allclose(one.output, other.output, rtol=1e-4, atol=1e-5) and torch.allclose(
        one.log_sum_exp, other.log_sum_exp, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("counts", [[5], [3, 4], [1, 1, 6, 2]])
def test_parts_together_are_the_whole(counts):
    parts, whole = parts_of(counts)
    assert close(merge(parts), whole)


def test_order_and_grouping_do_not_matter():
    parts, whole = parts_of([3, 4, 5])
    assert close(merge(parts[::-1]), whole)
    assert close(merge([merge(parts[:2]), parts[2]]), whole)


def test_one_part_is_given_back_as_it_is():
    parts, _ = parts_of([5])
    assert merge(parts) is parts[0]


def test_an_empty_part_changes_nothing():
    parts, whole = parts_of([3, 4])
    empty = nothing(torch.randn(2, 4, 3, 8))
    assert close(merge([empty, *parts, empty]), whole)


def test_queries_that_saw_nothing_anywhere_get_zeros():
    empty = nothing(torch.randn(1, 2, 3, 4))
    both = merge([empty, empty])
    assert (both.output == 0).all()
    assert (both.log_sum_exp == -torch.inf).all()


def test_parts_of_very_different_weight_stay_finite():
    heavy = Partial(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 3e4))
    light = Partial(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -3e4))
    both = merge([light, heavy])
    assert both.output.tolist() == [[[[1.0, 1.0]]]]
    assert both.log_sum_exp.item() == 3e4


def test_half_precision_stays_half_precision():
    parts, whole = parts_of([3, 4], dtype=torch.bfloat16)
    both = merge(parts)
    assert both.output.dtype == torch.bfloat16
    assert torch.allclose(both.output.float(), whole.output.float(), atol=3e-2)


def test_nothing_at_all_cannot_be_merged():
    with pytest.raises(AssertionError, match="nothing to merge"):
        merge([])
