"""Bits by measured loss: what they cost, and that no other way of giving as many bytes costs less."""

import itertools

import pytest
import torch

from kvfold.attention.bit_planes import ERRORS, bytes_of
from kvfold.encode.lowrank.bits import WIDTHS, allocate_bits
from kvfold.encode.lowrank.measured import MeasuredRanks
from kvfold.errors import PlanError
from kvfold.plan import members
from ranks import measured_layer, random_ranks

KVTC = members("encode")["kvtc"]


def cost(widths, alone, noise):
    """The loss that these bits cost by the measured figures."""
    left_out = [max(whole, one) for whole, one in zip(alone.tolist(), noise.tolist(), strict=True)]
    return sum(left_out[dim] if not width else noise[dim].item() * ERRORS[width] for dim, width in enumerate(widths))


def test_no_other_bits_of_as_many_in_all_cost_less():
    torch.manual_seed(3)
    alone, noise = torch.rand(5) ** 3, torch.rand(5) ** 3
    (found,) = allocate_bits(alone, noise, [5], 3)
    others = [widths for widths in itertools.product(WIDTHS, repeat=5) if sum(widths) <= sum(found)]
    assert cost(found, alone, noise) == pytest.approx(min(cost(widths, alone, noise) for widths in others))


def test_more_bytes_never_cost_more_and_the_bound_is_kept():
    torch.manual_seed(0)
    alone, noise = torch.rand(64) ** 4, torch.rand(64) ** 4
    before = float("inf")
    for wanted in (4, 8, 16, 24, 32, 48, 64):
        sides = allocate_bits(alone, noise, [40, 24], wanted)
        assert [len(side) for side in sides] == [40, 24]
        assert sum(map(bytes_of, sides)) <= wanted
        now = cost([width for side in sides for width in side], alone, noise)
        assert now <= before
        before = now


@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0])
def test_a_slot_takes_the_bits_that_were_asked_for(bits):
    torch.manual_seed(1)
    ranks = MeasuredRanks(layers={index: measured_layer(2, 32, None) for index in range(3)})
    layout = ranks.coded_layout(bits)
    stored = sum(sum(form.levels[0]) + 4 for form, _ in layout.formats.values())  # two float16 scales a layer
    asked = bits * 3 * 2 * 64 / 8
    assert 0.93 * asked <= stored <= asked


def test_an_adapter_without_measured_losses_is_refused_in_one_line():
    ranks = random_ranks(2, 8, [0])
    with pytest.raises(PlanError, match="bits by measured loss were asked for"):
        KVTC(basis="heads").bound(ranks)


@pytest.mark.parametrize("bits", [0, -1, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(PlanError, match="above 0 and up to 8"):
        KVTC(bits=bits)
