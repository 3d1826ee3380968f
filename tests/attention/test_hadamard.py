"""The rotation: its own inverse, orthogonal, and even over its vector."""

import pytest
import torch

from kvfold.attention.hadamard import rotated


@pytest.mark.parametrize("size", [1, 2, 7, 24, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_twice_is_the_vector_again(size, dtype):
    numbers = torch.randn(5, 3, size, dtype=dtype)
    back = rotated(rotated(numbers))
    assert back.dtype == dtype
    assert (back - numbers).abs().max() <= 8 * torch.finfo(dtype).eps * numbers.abs().max()


@pytest.mark.parametrize("size", [24, 64])
def test_scores_of_rotated_queries_and_keys_are_the_plain_ones(size):
    queries, keys = torch.randn(4, size).double(), torch.randn(9, size).double()
    assert torch.allclose(rotated(queries) @ rotated(keys).mT, queries @ keys.mT, atol=1e-12)


def test_one_large_number_is_spread_over_its_block():
    spike = torch.zeros(96)
    spike[40] = 8.0  # in the second of three blocks of 32
    found = rotated(spike)
    assert torch.allclose(found[32:64].abs(), torch.full((32,), 8.0 / 32**0.5))
    assert not found[:32].any()
    assert not found[64:].any()


def test_the_matrix_of_a_first_use_without_gradients_serves_later_ones():
    with torch.inference_mode():
        rotated(torch.randn(2, 512))
    numbers = torch.randn(2, 512, requires_grad=True)
    rotated(numbers).sum().backward()
    assert numbers.grad is not None
