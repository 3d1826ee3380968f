"""The oracle itself: against torch's own attention, and its manners at the edges."""

import torch

from kvfold.attention.reference import attend_part, causal_mask


def test_the_written_out_form_is_softmax_attention():
    queries, keys, values = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
    found, weights = attend_part(queries, keys, values, scale=0.3)
    stock = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=0.3, enable_gqa=True)
    assert torch.allclose(found, stock, rtol=1e-5, atol=1e-6)
    scores = queries @ keys.repeat_interleave(3, dim=1).mT * 0.3
    assert torch.allclose(weights, scores.logsumexp(-1), rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_in_float32():
    queries, keys = torch.randn(1, 2, 2, 8).bfloat16(), torch.randn(1, 2, 6, 8).bfloat16()
    found, weights = attend_part(queries, keys, keys, scale=1.0)
    assert found.dtype == torch.bfloat16
    assert weights.dtype == torch.float32


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient_that_is_nan():
    queries = torch.randn(1, 1, 2, 4, requires_grad=True)
    keys = torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[False, False, False], [True, True, True]])[None, None]
    found, weights = attend_part(queries, keys, keys, scale=1.0, mask=mask)
    assert (found[0, 0, 0] == 0).all()
    assert weights[0, 0, 0] == -torch.inf
    (gradient,) = torch.autograd.grad(found.sum(), queries)
    assert gradient.isfinite().all()


def test_new_tokens_are_the_last_of_what_is_stored():
    wanted = [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(2, 4, torch.device("cpu"))[0, 0].tolist() == wanted
