"""Rotations: those of the model, undone exactly, with a table that grows and is kept."""

import pytest
import torch

from fakes import model_of
from kvfold.attention.rotary import Rotary, rotate, unrotate
from kvfold.hf.rotary import rotary_of

SIZE = 8


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_keys_turn_back_to_what_they_were(family):
    model = model_of(family)
    positions = torch.tensor([0, 3, 200, 17])
    cosines, sines = rotary_of(model).at(positions)
    keys = torch.randn(4, cosines.shape[-1] + 4)
    scaled = (1.7 * cosines, 1.7 * sines)  # an attention scaling, as long-context kinds have
    for angles in ((cosines, sines), scaled):
        assert torch.allclose(unrotate(rotate(keys, *angles), *angles), keys, rtol=1e-4, atol=1e-5)


def test_rotations_are_those_of_the_model():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, positions = model_of("llama"), torch.tensor([[0, 5, 77]])
    keys = torch.randn(1, 2, 3, SIZE)
    angles = model.model.rotary_emb(keys, positions)
    wanted = apply_rotary_pos_emb(keys, keys, *angles)[1]
    cosines, sines = rotary_of(model).at(positions[0])
    assert torch.allclose(rotate(keys, cosines, sines), wanted, rtol=1e-5, atol=1e-6)


def quarter_turns(asked):
    """Angles by which each position turns by 90 degrees more; it remembers how many positions it was asked for."""

    def angles(positions):
        asked.append(len(positions))
        quarters = positions[:, None].float() * torch.pi / 2
        return quarters.cos().expand(-1, 4), quarters.sin().expand(-1, 4)

    return angles


def test_a_key_turns_within_pairs_that_lie_half_a_head_apart():
    cosines, sines = Rotary(angles=quarter_turns([])).at(torch.tensor([1]))
    key = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.allclose(rotate(key, cosines, sines), torch.tensor([[-3.0, -4.0, 1.0, 2.0]]), atol=1e-6)


def test_dimensions_that_a_model_does_not_rotate_stay():
    cosines, sines = Rotary(angles=quarter_turns([])).at(torch.tensor([1, 2]))
    keys = torch.randn(2, 7)
    assert torch.equal(rotate(keys, cosines, sines)[:, 4:], keys[:, 4:])
    assert torch.equal(unrotate(keys, cosines, sines)[:, 4:], keys[:, 4:])


def test_angles_are_asked_for_once_while_positions_are_known():
    asked = []
    rotary = Rotary(angles=quarter_turns(asked))
    rotary.at(torch.tensor([3]))
    rotary.at(torch.tensor([[0, 63]]))
    assert asked == [64]
    rotary.at(torch.tensor([64]))
    assert asked == [64, 65 + 65 // 8]
    assert rotary.table_bytes == 2 * (65 + 65 // 8) * 4 * 4


def test_no_positions_have_no_angles_and_positions_may_have_any_shape():
    rotary = Rotary(angles=quarter_turns([]))
    assert rotary.table_bytes == 0
    assert rotary.at(torch.zeros(0, dtype=torch.int32))[0].shape == (0, 4)
    assert rotary.at(torch.tensor([[1, 2, 3]], dtype=torch.int32))[1].shape == (1, 3, 4)


def test_a_table_that_another_thread_puts_there_meanwhile_is_not_given():
    class Raced(Rotary):
        def __setattr__(self, name, value):
            short = value if name != "table" or value is None else tuple(side[:64] for side in value)
            super().__setattr__(name, short)

    cosines, sines = Raced(angles=quarter_turns([])).at(torch.tensor([100]))
    assert cosines.shape == sines.shape == (1, 4)
