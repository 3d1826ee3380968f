"""Bit planes: what is read back, how many bytes it takes, and how far off it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.bit_planes import CELLS, ERRORS, BitPlanes, bytes_of, planes_of

WIDTHS = st.lists(st.sampled_from(sorted(ERRORS)), min_size=1, max_size=40)


def reference(vectors, bits, sizes):
    """Each number by itself: its cell around zero, and the middle of that cell. Returns what is read back."""
    coded = [dim for dim, width in enumerate(bits) if width]
    found = torch.zeros(len(vectors), len(bits))
    for row, vector in enumerate(vectors.tolist()):
        squares = [(vector[dim] / sizes[dim].item()) ** 2 for dim in coded]
        scale = torch.tensor((sum(squares) / max(len(coded), 1)) ** 0.5).clamp(6e-8, 65504).half().item()
        for dim in coded:
            cell = scale * CELLS[bits[dim]] * sizes[dim].item()
            half = 2 ** (bits[dim] - 1)
            place = min(max(vector[dim] // cell, -half), half - 1)
            found[row, dim] = (place + 0.5) * cell
    return found


@settings(max_examples=60, deadline=None)
@given(WIDTHS, st.integers(0, 5), st.integers(0, 10**6))
def test_vectors_are_read_back_as_the_middles_of_their_cells(bits, count, seed):
    torch.manual_seed(seed)
    sizes = torch.rand(len(bits) + 3) + 0.1
    vectors = torch.randn(count, len(bits) + 3) * sizes
    planes = BitPlanes.of(bits, sizes)
    codes, scales = planes.pack(vectors)
    assert codes.shape == (count, bytes_of(bits))
    assert codes.dtype == torch.uint8
    found = planes.unpack(codes, scales)
    # A number that lies on the border of two cells may fall into either: then both differ by one cell.
    wanted = reference(vectors, bits, sizes)
    close = torch.isclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert close.float().mean() > 0.99 or count == 0
    assert ((found - wanted).abs() <= 1.01 * scales.float()[:, None] * sizes[: len(bits)]).all()


@pytest.mark.parametrize("width", [width for width in ERRORS if width])
def test_the_error_of_normal_numbers_is_a_little_less_than_stated(width):
    torch.manual_seed(0)
    sizes = torch.ones(256)
    vectors = torch.randn(400, 256)
    planes = BitPlanes.of([width] * 256, sizes)
    error = (planes.unpack(*planes.pack(vectors)) - vectors).square().mean().item()
    assert 0.6 * ERRORS[width] < error < 1.05 * ERRORS[width]


def test_a_byte_holds_eight_dimensions_of_a_plane_and_planes_nest():
    assert planes_of([4, 0, 2, 2, 8]) == (4, 4, 2, 2, 1, 1, 1, 1)
    assert bytes_of([4] * 16) == 8
    assert bytes_of([3] * 9) == 6  # two bytes a plane
    assert bytes_of([0, 0]) == 0


def test_vectors_without_bits_take_nothing_and_are_zero():
    planes = BitPlanes.of([0, 0, 0], torch.ones(3))
    codes, scales = planes.pack(torch.randn(4, 3))
    assert codes.shape == (4, 0)
    assert not planes.unpack(codes, scales).any()


def test_vectors_of_zeros_and_of_huge_numbers_stay_finite():
    planes = BitPlanes.of([4] * 8, torch.ones(8))
    for vectors in (torch.zeros(2, 8), torch.full((2, 8), 1e30)):
        assert torch.isfinite(planes.unpack(*planes.pack(vectors))).all()
