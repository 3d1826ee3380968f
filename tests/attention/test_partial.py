"""One part's attention: the fast kernel against the written-out form, and every trap of that kernel by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, nothing, partial
from kvfold.attention.reference import attend_part, causal_mask

SCALE = 0.35


def tensors(*, rows=2, group=2, heads=2, new=5, stored=7, size=8, dtype=torch.float32):
    queries = torch.randn(rows, heads * group, new, size, dtype=dtype)
    return (
        queries,
        torch.randn(rows, heads, stored, size, dtype=dtype),
        torch.randn(rows, heads, stored, size, dtype=dtype),
    )


def exact(queries, keys, values, mask=None):
    """The written-out form in float64."""
    return Partial(*attend_part(queries.double(), keys.double(), values.double(), scale=SCALE, mask=mask))


def rms(found, wanted):
    return float((found.double() - wanted.double()).square().mean().sqrt())


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fast_path_errs_at_most_twice_as_much_as_stock_attention(dtype, masked, new):
    given_ = tensors(new=new, size=16, stored=40, dtype=dtype)
    mask = torch.rand(2, 1, 1, 40) < 0.7 if masked else None
    wanted = exact(*given_, mask)
    stock = torch.nn.functional.scaled_dot_product_attention(*given_, attn_mask=mask, scale=SCALE, enable_gqa=True)
    found = partial(*given_, scale=SCALE, mask=mask)
    assert rms(found.output, wanted.output) <= 2 * rms(stock, wanted.output)
    assert found.log_sum_exp.dtype == torch.promote_types(dtype, torch.float32)
    assert rms(found.log_sum_exp, wanted.log_sum_exp) <= 4 * torch.finfo(dtype).eps


def test_causal_attention_is_that_of_new_tokens_among_themselves():
    given_ = tensors(stored=5)
    wanted = exact(*given_, causal_mask(5, 5, torch.device("cpu")))
    assert rms(partial(*given_, scale=SCALE, causal=True).output, wanted.output) < 1e-6


def test_causal_and_masked_attention_hides_both():
    given_ = tensors(stored=5)
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])[:, None, None]
    wanted = exact(*given_, causal_mask(5, 5, torch.device("cpu")) & valid)
    found = partial(*given_, scale=SCALE, causal=True, mask=valid)
    assert rms(found.output, wanted.output) < 1e-6
    assert torch.equal(found.log_sum_exp == -torch.inf, wanted.log_sum_exp == -torch.inf)


def test_trap_a_row_masked_everywhere_weighs_nothing_in_a_merge():
    queries, keys, values = tensors()
    blind = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    blind[0] = False
    hidden = partial(queries, keys, values, scale=SCALE, mask=blind)
    assert (hidden.log_sum_exp[0] == -torch.inf).all()
    assert (hidden.output[0] == 0).all()
    other = partial(queries, keys + 1, values, scale=SCALE)
    assert torch.allclose(merge([other, hidden]).output[0], other.output[0], rtol=1e-6, atol=1e-6)


def test_who_promises_that_every_query_sees_something_gets_the_same_answer():
    queries, keys, values = tensors()
    mask = torch.arange(7)[None, None, None] > torch.tensor([2, 5])[:, None, None, None]
    wanted = partial(queries, keys, values, scale=SCALE, mask=mask)
    found = partial(queries, keys, values, scale=SCALE, mask=mask, sighted=True)
    assert torch.equal(found.output, wanted.output)
    assert torch.equal(found.log_sum_exp, wanted.log_sum_exp)


def test_trap_no_keys_at_all_is_an_empty_answer_and_kills_nothing():
    queries, keys, values = tensors(stored=0)
    found = partial(queries, keys, values, scale=SCALE)
    assert (found.log_sum_exp == -torch.inf).all()
    assert (found.output == 0).all()
    assert merge([found, found]).output.isfinite().all()


def test_trap_fewer_causal_queries_than_keys_is_refused():
    with pytest.raises(AssertionError, match="new tokens against themselves"):
        partial(*tensors(new=3, stored=7), scale=SCALE, causal=True)


def test_trap_gradients_go_through_the_log_sum_exp():
    queries, keys, values = tensors(dtype=torch.float64)
    for tensor in (queries, keys, values):
        tensor.requires_grad_()
    whole = attend_part(queries, keys, values, scale=SCALE)[0].square().sum()
    wanted = torch.autograd.grad(whole, (queries, keys, values))
    halves = [partial(queries, keys[:, :, s], values[:, :, s], scale=SCALE) for s in (slice(0, 3), slice(3, 7))]
    found = torch.autograd.grad(merge(halves).output.square().sum(), (queries, keys, values))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_trap_keys_and_values_of_different_dtypes_are_served():
    queries, keys, values = tensors()
    found = partial(queries, keys, values.bfloat16(), scale=SCALE)
    assert rms(found.output, exact(queries, keys, values).output) < 1e-2


def test_autocast_that_mixes_dtypes_gives_the_answer_of_its_inputs():
    queries, keys, values = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = partial(queries, keys, values.bfloat16(), scale=SCALE)
    assert rms(found.output, exact(queries, keys, values).output) < 2e-2


def test_each_query_head_reads_the_keys_of_its_group():
    queries, keys, values = tensors(heads=2, group=3, new=2)
    whole = partial(queries, keys, values, scale=SCALE)
    for head in range(2):
        of_group = slice(3 * head, 3 * head + 3)
        alone = partial(queries[:, of_group], keys[:, head, None], values[:, head, None], scale=SCALE)
        assert torch.allclose(whole.output[:, of_group], alone.output, rtol=1e-5, atol=1e-6)
        assert torch.allclose(whole.log_sum_exp[:, of_group], alone.log_sum_exp, rtol=1e-5, atol=1e-6)


def test_trap_no_queries_at_all_are_an_empty_answer_and_kill_nothing():
    queries, keys, values = tensors(new=0)
    assert partial(queries, keys, values, scale=SCALE).output.shape == queries.shape
    assert nothing(queries).output.shape == queries.shape


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_merged_equal_the_whole(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 10_000))
    queries, keys, values = tensors(
        rows=draw(1, 3), group=draw(1, 4), heads=draw(1, 3), new=draw(1, 4), stored=draw(1, 12)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, keys.shape[2]), max_size=3)))
    valid = torch.rand(queries.shape[0], 1, 1, keys.shape[2]) < 0.6 if data.draw(st.booleans()) else None
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, keys.shape[2]], strict=True):
        mask = None if valid is None else valid[..., start:stop]
        parts.append(partial(queries, keys[:, :, start:stop], values[:, :, start:stop], scale=SCALE, mask=mask))
    wanted, found = exact(queries, keys, values, valid), merge(parts)
    assert rms(found.output, wanted.output) < 2e-6
    assert torch.equal(found.log_sum_exp.isfinite(), wanted.log_sum_exp.isfinite())


@pytest.mark.gpu
@pytest.mark.parametrize("new", [1, 5, 300])
@pytest.mark.parametrize("ways", ["open", "masked", "causal", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 32, 64, 128])
def test_kernels_of_cuda_are_attention(size, dtype, ways, new):
    causal, masked = ways in ("causal", "both"), ways in ("masked", "both")
    stored = new if causal else 5000
    given_ = tuple(one.cuda() for one in tensors(new=new, size=size, stored=stored, dtype=dtype))
    mask = (torch.rand(2, 1, 1, stored) < 0.7).cuda() if masked else None
    triangle = causal_mask(new, stored, torch.device("cuda")) if causal else None
    seen = triangle if mask is None else mask if triangle is None else mask & triangle
    wanted = exact(*given_, seen)
    found = partial(*given_, scale=SCALE, mask=mask, causal=causal)
    stock = torch.nn.functional.scaled_dot_product_attention(*given_, attn_mask=seen, scale=SCALE, enable_gqa=True)
    there = wanted.log_sum_exp.isfinite()
    assert torch.equal(found.log_sum_exp.isfinite(), there)
    assert rms(found.output[there], wanted.output[there]) <= 3 * rms(stock[there], wanted.output[there]) + 1e-7
    largest = float(wanted.log_sum_exp[there].abs().max())
    assert rms(found.log_sum_exp[there], wanted.log_sum_exp[there]) <= 4 * torch.finfo(torch.float32).eps * (
        largest + 1
    )
