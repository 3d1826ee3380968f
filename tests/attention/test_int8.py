"""Numbers as bytes: no number moves by more than half a scale, zeros stay, and every edge has an answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.int8 import to_int8


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(1e-2, 1e6), st.integers(0, 999))
def test_no_number_moves_by_more_than_half_a_scale(size, width, seed):
    torch.manual_seed(seed)
    numbers = torch.randn(3, size) * width
    integers, scales = to_int8(numbers)
    moved = (integers.float() * scales.float()[:, None] - numbers).abs()
    # The scale itself is rounded, to eleven bits or to a step of the smallest float16, and 127 of them are the largest.
    wide = scales.float()[:, None]
    rounding = (wide / 2048).clamp(min=2.0**-25)
    assert bool((moved <= 0.5 * wide + 127.5 * rounding).all())


def test_bytes_and_scales_have_their_types_and_one_scale_stands_for_a_vector():
    integers, scales = to_int8(torch.randn(2, 3, 8, dtype=torch.float64))
    assert (integers.dtype, scales.dtype) == (torch.int8, torch.float16)
    assert integers.shape == (2, 3, 8)
    assert scales.shape == (2, 3)


def test_the_largest_number_of_either_sign_becomes_127():
    integers, _ = to_int8(torch.tensor([[1.0, -2.0, 0.0], [4.0, -3.0, 2.0]]))
    assert integers[0].tolist() == [64, -127, 0]
    assert integers[1, 0] == 127
    assert int(integers.min()) >= -127


def test_zeros_stay_zeros():
    integers, scales = to_int8(torch.zeros(2, 4))
    assert not integers.any()
    assert bool((scales > 0).all())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_is_written_as_nothing(shape):
    integers, scales = to_int8(torch.zeros(shape))
    assert integers.shape == shape
    assert scales.shape == shape[:1]


def test_numbers_beyond_the_largest_scale_are_cut_and_never_infinite():
    integers, scales = to_int8(torch.tensor([[1e9, -1e9, 1.0]]))
    assert integers.tolist() == [[127, -127, 0]]
    assert bool(scales.isfinite().all())
